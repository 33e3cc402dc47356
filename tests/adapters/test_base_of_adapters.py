"""Which base model an adapter belongs to, and that it changes nothing of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mixlora_exp.adapters import attach_adapter, load_adapter, load_adapters, save_adapter
from mixlora_exp.adapters.base_check import refusal
from mixlora_exp.adapters.mixed_adapters import check_shareable
from mixlora_exp.adapters.model import MixLoraModel
from mixlora_exp.errors import UserError
from mixlora_exp.models import BaseIdentity, build_hf_config, load_model, load_tokenizer, read_base

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base_model.json"
TINY = compose(["model=tiny", "method=lora", "method.rank=2", "kernel=exact"])
KERNEL = TINY.kernel
Load = Callable[..., PeftModel]


def alone(base: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    return load_adapter(base, folder, KERNEL, **options)


def hosted(base: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    return load_adapters(base, {"it": folder}, **options)


EITHER = pytest.mark.parametrize("load", [alone, hosted])


def model_at(folder: Path, *, seed: int = 3) -> Path:
    config = TINY.model
    load_model(config, torch.float32, seed=seed).save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)
    return folder


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(dataclasses.replace(TINY.model, path=str(folder)), dtype)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A LoRA that was trained on the model in `tmp_path`/model."""
    config = TINY
    base = opened(model_at(tmp_path / "model"))
    save_adapter(attach_adapter(base, config.method, config.kernel, 0), tmp_path / "adapter")
    return tmp_path / "adapter"


@EITHER
def test_the_same_weights_elsewhere_are_the_same_base(
    load: Load, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another folder, another name, a model half as precise: nobody has to be asked."""
    (tmp_path / "model").rename(tmp_path / "Elsewhere")
    for dtype in (torch.float32, torch.bfloat16):
        base = opened(tmp_path / "Elsewhere", dtype)
        base.config.name_or_path = "mirror/Model/"
        load(base, trained)
    assert capsys.readouterr().err == ""


@EITHER
def test_other_weights_of_the_same_shape_are_refused(
    load: Load, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_at(tmp_path / "other", seed=4)
    message = r"was trained on tiny \(path model\), not on tiny \(path other\).*base=accept"
    with pytest.raises(UserError, match=message):
        load(opened(other), trained)
    load(opened(other), trained, accept=True)
    # Under the same name as well.
    load_model(TINY.model, torch.float32, seed=5).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="by their shape or since their files were changed"):
        load(opened(tmp_path / "model"), trained)
    assert "warning" not in capsys.readouterr().err


@EITHER
def test_random_bases_are_distinguished_by_their_seed(load: Load, tmp_path: Path) -> None:
    config = compose(["model=tiny", "method=mixlora", "method.rank=2"])
    base = load_model(config.model, torch.float32, seed=7)
    save_adapter(attach_adapter(base, config.method, config.kernel, 0), tmp_path / "adapter")
    load(load_model(config.model, torch.bfloat16, seed=7), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"give that model \(model=tiny seed=7\)"):
        load(load_model(config.model, torch.float32, seed=8), tmp_path / "adapter")


@EITHER
def test_an_adapter_without_a_note_is_judged_by_shapes_with_a_warning(
    load: Load, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever name it gives: that says nothing about the weights."""
    (trained / BASE).unlink()
    path = trained / CONFIG
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "a/b\x1b[2J"}))
    base = opened(tmp_path / "model")
    base.config.name_or_path = "c/d"
    load(base, trained)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: adapter={trained}: ")
    assert "it names a/b\\x1b[2J" in line
    assert "judged by shapes alone" in line


def test_every_adapter_of_a_base_is_saved_with_its_note(tmp_path: Path) -> None:
    """Also by its own name beside others."""
    base = load_model(TINY.model, torch.float32, seed=2)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), "first")
    save_adapter(model, tmp_path / "adapter", "first")
    noted = read_base(tmp_path / "adapter")
    assert (noted.model, noted.source, noted.seed) == ("tiny", "random", 2)
    # PEFT passes over it.
    PeftModel.from_pretrained(load_model(TINY.model, torch.float32), str(tmp_path / "adapter"))


# What an adapter's file holds.


def by_peft(folder: Path, base: PreTrainedModel, **options: Any) -> Path:
    """A LoRA that PEFT writes, drawn."""
    given = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base, LoraConfig(**given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


EMBEDDING = "base_model.model.model.embed_tokens.weight"


@EITHER
@pytest.mark.parametrize(
    "name",
    [
        EMBEDDING,
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.1.self_attn.k_proj.weight",
        "base_model.model.model.norm.weight",
    ],
)
def test_weights_of_another_base_are_no_part_of_an_adapter(
    load: Load, name: str, base_of, tmp_path: Path
) -> None:
    """They would change the base for every adapter beside it."""
    folder = by_peft(tmp_path / "a", base_of())
    own = dict(base_of().named_parameters())[
        name.removeprefix("base_model.model.").replace(".base_layer", "")
    ]
    change(folder, lambda tensors: tensors.update({name: own.detach() + 1}))
    base = base_of()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    with pytest.raises(UserError, match="contains weights of another base model") as error:
        load(base, folder)
    assert name in str(error.value)
    after = {key.replace(".base_layer", ""): t for key, t in base.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@EITHER
def test_resized_embeddings_are_refused(load: Load, base_of, tmp_path: Path) -> None:
    folder = by_peft(tmp_path / "a", base_of())
    change(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(1030, 64)}))
    with pytest.raises(UserError, match="contains weights of another base model"):
        load(base_of(), folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_s_own_weights_in_the_file_do_no_harm(base_of, dtype, tmp_path: Path) -> None:
    """PEFT saves an adapted head's along."""
    folder = by_peft(tmp_path / "a", base_of(), target_modules=["lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folder / WEIGHTS)
    model = alone(base_of(dtype=dtype), folder)
    assert torch.equal(
        model.get_base_model().lm_head.base_layer.weight, base_of(dtype=dtype).lm_head.weight
    )


@EITHER
def test_a_tensor_of_nobody_is_refused(load: Load, base_of, tmp_path: Path) -> None:
    folder = by_peft(tmp_path / "a", base_of())
    change(folder, lambda tensors: tensors.update({"stray": torch.zeros(3)}))
    with pytest.raises(UserError, match="stray is neither a tensor of this adapter"):
        load(base_of(), folder)


def biased() -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = build_hf_config(TINY.model)
    settings.attention_bias = True
    model = LlamaForCausalLM(settings).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"bias": "all"}, "q_proj.base_layer.bias"),
        ({"bias": "lora_only"}, "q_proj.base_layer.bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({}, "up_proj.lora_B"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"trainable_token_indices": [1, 2]}, "token_adapter"),
    ],
)
def test_what_the_configuration_calls_for_must_be_there(
    options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    """Else a fresh one stood in its place, or the base's."""
    folder = by_peft(tmp_path / "a", biased(), target_modules=["q_proj"] + (
        ["up_proj"] if not options else []), **options)  # fmt: skip
    expected = PeftModel.from_pretrained(biased(), str(folder))
    found = alone(biased(), folder)
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, expected(ids).logits, atol=1e-5)
    name = next(key for key in load_file(folder / WEIGHTS) if part in key)
    change(folder, lambda tensors: tensors.pop(name))
    message = "lacks 1 tensors that its configuration calls for"
    with pytest.raises(UserError, match=message) as error:
        alone(biased(), folder)
    assert part in str(error.value)
    assert "model=NAME" not in str(error.value)


@EITHER
@pytest.mark.parametrize(
    "part", ["lora_A_gate", "lora_router", "lora_magnitude_down", "q_proj.lora_A"]
)
def test_experts_must_be_there(load: Load, part: str, kit, base_of, tmp_path: Path) -> None:
    folder, _ = kit.adapter(tmp_path / "a", "mixlora", use_dora=True)
    name = next(key for key in load_file(folder / WEIGHTS) if part in key)
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match="lacks 1 tensors that its configuration calls for"):
        load(base_of(), folder)


@pytest.mark.parametrize("kind", ["lora", "mixlora"])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_the_base_is_not_shared(
    kind: str, options: dict[str, Any], kit, base_of, tmp_path: Path
) -> None:
    folder, _ = kit.adapter(tmp_path / "a", kind)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    for refused in (lambda: check_shareable(folder), lambda: hosted(base_of(), folder)):
        with pytest.raises(UserError, match="changes the base model, which other adapters cannot"):
            refused()


def test_a_refused_adapter_leaves_the_base_to_others(base_of, kit, tmp_path: Path) -> None:
    good, expected = kit.adapter(tmp_path / "good", "lora")
    bad, _ = kit.adapter(tmp_path / "bad", "mixlora")
    change(bad, lambda tensors: tensors.popitem())
    base = base_of()
    with pytest.raises(UserError):
        alone(base, bad)
    assert torch.allclose(kit.of(alone(base, good)), expected, atol=1e-5)


def test_an_adapter_that_peft_cannot_build_leaves_the_base(
    base_of, kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT may raise when some layers are adapted already."""
    good, expected = kit.adapter(tmp_path / "good", "mixlora")
    base = base_of()
    names = [name for name, _ in base.named_modules()]
    stock, calls = MixLoraModel._create_and_replace, []

    def fails_later(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("no such layer")
        return stock(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(MixLoraModel, "_create_and_replace", fails_later)
        with pytest.raises(UserError, match="no such layer"):
            alone(base, good)
    assert [name for name, _ in base.named_modules()] == names
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.allclose(kit.of(alone(base, good)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "entry",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "this"},
        {"peft_type": "XLORA", "adapters": {"a": "/b"}},
    ],
)
@EITHER
def test_what_a_file_names_is_not_opened(
    load: Load, entry: dict[str, Any], base_of, tmp_path: Path
) -> None:
    folder = by_peft(tmp_path / "a", base_of())
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(UserError, match="is refused|is not served here"):
        load(base_of(), folder)


def test_accepting_is_offered_only_where_the_sizes_of_layers_may_fit(tmp_path: Path) -> None:
    def base(model: str, source: str = "hub") -> BaseIdentity:
        return BaseIdentity(model, source, model)

    told = str(refusal(tmp_path, base("llama2_7b"), base("gemma_2b")))
    assert told.endswith("whose layers have other sizes: give that model (model=llama2_7b)")
    for then, now in (
        (base("llama2_7b"), base("llama2_7b")),
        (base("llama2_7b"), base("gemma_2b", "path")),
        # No file is opened by a name that stands beside an adapter.
        (base("../model/llama2_7b"), base("gemma_2b")),
    ):
        assert "base=accept" in str(refusal(tmp_path, then, now))
