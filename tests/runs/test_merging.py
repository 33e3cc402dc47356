"""A merged checkpoint, read back, computes what the adapter does, or is not written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixlora_exp.adapters import set_kernel
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.head import full_precision_head
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.precision import autocast
from mixlora_exp.serving import merge as merging
from mixlora_exp.serving.merge import merge, write_merged
from mixlora_exp.serving.open import Opened

IDS = torch.tensor([[5, 9, 700, 31, 8], [77, 3, 1000, 12, 6]])
TIED = ["lm_head", "embed_tokens"]
ENDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "both, tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "a copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copies of both": {"target_modules": ["q_proj"], "modules_to_save": TIED},
    "a copy and an adapter": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "a few rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 700]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def opened() -> Callable[..., Opened]:
    """A tiny model with an adapter of PEFT's whose weights are all away from their start."""

    def make(
        model: str = "tiny_gemma", precision: str = "float32", size: float = 0.1, **settings: Any
    ) -> Opened:
        config = compose([f"model={model}", f"trainer.precision={precision}"])
        base = load_model(config.model, getattr(torch, precision), 0)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, **settings))
            with torch.no_grad():
                for name, weight in adapted.named_parameters():
                    if weight.requires_grad and "lora_A" not in name:
                        weight += size * torch.randn(weight.shape).to(weight.dtype)
        set_kernel(adapted, "auto")
        return Opened(adapted.eval(), load_tokenizer(config.model), config)

    return make


@torch.no_grad()
def logits(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with autocast(torch.device("cpu"), dtype), full_precision_head(model):
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("model", "ends", "dora"),
    [
        *(("tiny", ends, number % 2 == 0) for number, ends in enumerate(ENDS)),
        *(("tiny_gemma", ends, number % 2 == 1) for number, ends in enumerate(ENDS)),
        # Here alone the two differ.
        ("tiny_gemma", "both, tied", False),
    ],
)
def test_adapters_on_embedding_and_head(
    model: str, ends: str, dora: bool, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    """Of models that tie the two as well: what the adapter makes different is untied."""
    one = opened(model, use_dora=dora, **ENDS[ends])
    expected = logits(one.model)
    assert (logits(one.model.get_base_model()) - expected).abs().max() < 1e-6
    with one.model.disable_adapter():
        assert (logits(one.model) - expected).abs().max() > 0.01
    write_merged(one, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype is torch.float32
    assert (logits(plain) - expected).abs().max() < 1e-4
    same = torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    assert plain.config.tie_word_embeddings == (model == "tiny_gemma" and same)
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not plain.config.tie_word_embeddings)
    if model == "tiny_gemma":
        # DoRA's magnitudes are not tied by PEFT.
        assert same == (ends == "a few rows" or (ends == "both, tied" and not dora))


@pytest.mark.parametrize("ends", ["head", "embedding", "both"])
def test_in_bf16(ends: str, opened: Callable[..., Opened], tmp_path: Path) -> None:
    one = opened("tiny_gemma", "bfloat16", **ENDS[ends])
    expected = logits(one.model, torch.bfloat16)
    write_merged(one, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype is torch.bfloat16
    found = logits(plain, torch.bfloat16)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_tie_that_is_forgotten_is_caught(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_untie", lambda _: False)
    for precision in ("float32", "bfloat16"):
        one = opened("tiny_gemma", precision, **ENDS["head"])
        with pytest.raises(UserError, match=r"differs from the adapter .* nothing was"):
            write_merged(one, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def of_base(one: Opened, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return load_model(one.config.model, weights[name].dtype, 0).get_parameter(name).data


def without_adapter(one: Opened, weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = of_base(one, weights, name)


def transposed(_: Opened, weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name].T.contiguous()


def broken(_: Opened, weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name][0, 0] = float("nan")


def shifted(_: Opened, weights: dict[str, torch.Tensor], name: str) -> None:
    """In a layer that has no adapter."""
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.05


def nudged(_: Opened, weights: dict[str, torch.Tensor], name: str) -> None:
    """By the least that bf16 or float32 can hold, in a layer that has no adapter."""
    bits = {2: torch.int16, 4: torch.int32}
    weight = weights["model.layers.0.mlp.up_proj.weight"]
    weight.view(bits[weight.element_size()])[3, 5] += 1


def all_without_adapter(one: Opened, weights: dict[str, torch.Tensor], _: str) -> None:
    for name in weights:
        if "q_proj" in name or "o_proj" in name:
            weights[name] = of_base(one, weights, name)


def changed_change(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[Opened, dict[str, torch.Tensor], str], None]:
    """Let what the adapter has changed in one layer be something else."""

    def damage(one: Opened, weights: dict[str, torch.Tensor], name: str) -> None:
        base = of_base(one, weights, name).float()
        wrong = base + change(weights[name].float() - base)
        weights[name] = wrong.to(weights[name].dtype).contiguous()

    return damage


SMALL = {
    "one forgotten": without_adapter,
    "all forgotten": all_without_adapter,
    "doubled": changed_change(lambda change: 2 * change),
    "halved": changed_change(lambda change: change / 2),
    "subtracted": changed_change(lambda change: -change),
    "transposed": changed_change(lambda change: change.T),
}


def effects(one: Opened) -> list[float]:
    """What the adapter changes in each layer's weight, relative to it."""
    layers = [m for m in one.model.modules() if isinstance(m, LoraLayer)]
    return [
        float(m.get_delta_weight("default").norm() / m.get_base_layer().weight.float().norm())
        for m in layers
    ]


@pytest.fixture
def damaging(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the files of the last layer be changed once they are written."""

    def prepare(one: Opened, damage: Callable[..., None]) -> None:
        save = PreTrainedModel.save_pretrained

        def damaged(model: PreTrainedModel, folder: Path, **settings: Any) -> None:
            save(model, folder, **settings)
            weights = load_file(folder / "model.safetensors")
            damage(one, weights, "model.layers.1.self_attn.o_proj.weight")
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)

    return prepare


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", [without_adapter, transposed, broken, shifted, nudged])
def test_a_wrong_checkpoint_is_caught(
    damage: Callable[..., None],
    precision: str,
    opened: Callable[..., Opened],
    damaging: Callable[..., None],
    tmp_path: Path,
) -> None:
    """One layer of the last is enough."""
    one = opened("tiny", precision, target_modules=["q_proj", "o_proj"])
    damaging(one, damage)
    with pytest.raises(UserError, match="differs from the adapter") as caught:
        write_merged(one, tmp_path / "merged")
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "precision", "size", "dora"),
    [
        (damage, *held, (number + turn) % 2 == 1)
        for number, damage in enumerate(SMALL)
        for turn, held in enumerate(
            [("bfloat16", 1.5e-4), ("float32", 1.5e-4), ("float32", 1.5e-7)]
        )
    ],
)
def test_a_wrong_merge_of_a_small_adapter_is_caught(
    damage: str,
    precision: str,
    size: float,
    dora: bool,
    opened: Callable[..., Opened],
    damaging: Callable[..., None],
    tmp_path: Path,
) -> None:
    """One that changes a hundredth of a layer, and in float32 a hundred-thousandth."""
    one = opened("tiny", precision, size, target_modules=["q_proj", "o_proj"], use_dora=dora)
    assert all(50 * size < effect < 120 * size for effect in effects(one))
    damaging(one, SMALL[damage])
    with pytest.raises(UserError, match="differs from the adapter"):
        write_merged(one, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dora", "size", "precision"),
    [
        ((number + turn) % 2 == 1, size, precision)
        for number, size in enumerate([1.5e-4, 1.5e-5, 1.5e-7, 0.0])
        for turn, precision in enumerate(["float32", "bfloat16"])
    ],
)
def test_a_right_merge_of_a_small_adapter_is_written(
    dora: bool,
    size: float,
    precision: str,
    opened: Callable[..., Opened],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a word where bf16 cannot hold what it changes."""
    targets = ["q_proj", "o_proj", "embed_tokens", "lm_head"]
    one = opened("tiny", precision, size, target_modules=targets, use_dora=dora)
    write_merged(one, tmp_path / "merged")
    told = [record.getMessage() for record in caplog.records if record.name.startswith("mixlora")]
    if precision == "bfloat16" and 0 < size < 1e-6:
        (line,) = told
        assert line.endswith("trainer.precision=float32 preserves it")
        assert "\n" not in line
    elif precision == "float32" or size == 1.5e-4 or (size == 0.0 and not dora):
        # PEFT rounds the magnitudes that DoRA starts with to bf16, which is an effect too.
        assert told == []


@pytest.mark.parametrize("where", ["PEFT's layers", "the whole model"])
def test_a_merge_that_does_nothing_is_caught(
    where: str, opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened("tiny", "bfloat16", 1.5e-4, target_modules=["q_proj", "o_proj"])
    if where == "PEFT's layers":
        monkeypatch.setattr(lora.Linear, "merge", lambda *_, **__: None)
    else:
        monkeypatch.setattr(merging, "merge", lambda opened: opened.model.unload())
    with pytest.raises(UserError, match="differs from the adapter"):
        write_merged(one, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_configuration_is_caught(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened("tiny", target_modules=["q_proj"])
    save = PreTrainedModel.save_pretrained

    def lossy(model: PreTrainedModel, folder: Path, **settings: Any) -> None:
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 100.0}
        save(model, folder, **settings)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy)
    with pytest.raises(UserError, match=r"\(the logits: relative error"):
        write_merged(one, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_what_peft_cannot_merge_is_reported(opened: Callable[..., Opened], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lora_bias"):
        one = opened("tiny", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match="adapter cannot be merged .*no bias"):
        write_merged(one, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_of_two_merges_at_once_one_wins(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is whole before the first is: neither writes to the other's folder."""
    first, second = (opened("tiny", target_modules=[name]) for name in ("q_proj", "o_proj"))
    expected = logits(second.model)
    read = merging.read_model

    def late(*args: Any) -> PreTrainedModel:
        monkeypatch.setattr(merging, "read_model", read)
        write_merged(second, tmp_path / "merged")
        return read(*args)

    monkeypatch.setattr(merging, "read_model", late)
    with pytest.raises(UserError, match=r"merged already exists: name another folder"):
        write_merged(first, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(plain) - expected).abs().max() < 1e-4


def test_memory_holds_one_model(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged weights are let go of before the checkpoint is read back."""
    one = opened("tiny", target_modules=["q_proj"])
    read = merging.read_model
    held: list[set[str]] = []

    def spy(*args: Any) -> PreTrainedModel:
        held.append({weight.device.type for weight in one.model.parameters()})
        return read(*args)

    monkeypatch.setattr(merging, "read_model", spy)
    write_merged(one, tmp_path / "merged")
    assert held == [{"meta"}]


def test_a_merge_stays_tied_without_an_adapter_on_the_ends(opened: Callable[..., Opened]) -> None:
    merged = merge(opened("tiny_gemma", target_modules=["q_proj", "down_proj"]))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
