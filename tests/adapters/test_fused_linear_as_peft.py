"""Fused layers are PEFT's: names, files, switching, merging, and a way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import CPU_KERNELS
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as stock
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.linear import FusedLinear, ReferenceLinear
from mixlora_exp.kernels import KERNELS, resolve_kernel

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def use_dora(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def lora_of(base_of, draw, use_dora) -> Callable[..., PeftModel]:
    def make(kernel: str = "exact", **changes: Any) -> PeftModel:
        torch.manual_seed(0)
        options = {"r": 4, "use_dora": use_dora, "target_modules": TARGETS, **changes}
        model = get_peft_model(base_of(), LoraConfig(task_type="CAUSAL_LM", **options))
        draw(model)
        set_kernel(model, kernel)
        return model.eval()

    return make


@torch.no_grad()
def logits(model: nn.Module, batch, **options: Any) -> Tensor:
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options
    ).logits


def layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each layer that is computed fused."""
    calls: list[str] = []
    real = FusedLinear.compute

    def counted(self: FusedLinear, x: Tensor, layers: Sequence[FusedLinear], adapter: str):
        calls.extend("fused" for _ in layers)
        return real(self, x, layers, adapter)

    monkeypatch.setattr(FusedLinear, "compute", counted)
    return calls


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_set_kernel_changes_the_class_and_nothing_else(lora_of, batch) -> None:
    model = lora_of("peft")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    assert {type(layer) for layer in layers(model)} == {stock.Linear}
    expected = logits(model, batch)
    wanted_of = {"fused": FusedLinear, "plain": ReferenceLinear, "peft": stock.Linear}
    for kernel in (*CPU_KERNELS, "auto", "peft"):
        wanted = wanted_of[KERNELS[resolve_kernel(kernel)].linear]
        set_kernel(model, kernel)
        assert {type(layer) for layer in layers(model)} == {wanted}
        assert len(layers(model)) == 2 * len(TARGETS)
        same(logits(model, batch), expected)
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], state[name]) for name in state)
        assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model, batch), expected)


def test_files_are_those_of_peft(lora_of, base_of, batch, tmp_path: Path) -> None:
    fused, peft = lora_of("exact"), lora_of("peft")
    for model, name in ((fused, "fused"), (peft, "peft")):
        logits(model, batch)  # what a pass leaves behind must not be saved
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    files = sorted(path.name for path in (tmp_path / "fused").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    for name in files:
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    # Saved fused, loaded by PEFT alone; saved by PEFT, loaded and run fused.
    by_peft = PeftModel.from_pretrained(base_of(), tmp_path / "fused")
    assert {type(layer) for layer in layers(by_peft)} == {stock.Linear}
    assert torch.equal(logits(by_peft, batch), logits(peft, batch))
    by_us = PeftModel.from_pretrained(base_of(), tmp_path / "peft")
    set_kernel(by_us, "exact")
    assert torch.equal(logits(by_us, batch), logits(fused, batch))
    same(logits(fused, batch), logits(peft, batch))


def test_one_adapter_runs_fused(lora_of, batch, fused_calls) -> None:
    """So that the fallbacks below are told from the fused pass."""
    logits(lora_of(), batch)
    assert len(fused_calls) == 2 * len(TARGETS)
    fused_calls.clear()
    logits(lora_of("peft"), batch)
    assert not fused_calls


def test_disable_adapter(lora_of, base_of, batch, fused_calls) -> None:
    model = lora_of()
    adapted = logits(model, batch)
    fused_calls.clear()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base_of(), batch))
        assert not fused_calls
    assert torch.equal(logits(model, batch), adapted)


def two_adapters(lora_of, draw, kernel: str, **changes: Any) -> PeftModel:
    model = lora_of(kernel)
    options = {"r": 2, "use_dora": False, "target_modules": TARGETS, **changes}
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", **options))
    model.set_adapter("second")
    draw(model, seed=8)
    model.set_adapter("default")
    return model


def test_several_active_adapters_run_as_in_peft(lora_of, draw, batch, fused_calls) -> None:
    found = []
    for kernel in ("exact", "peft"):
        model = two_adapters(lora_of, draw, kernel)
        model.base_model.set_adapter(["default", "second"])
        found.append(logits(model, batch))
    assert not fused_calls
    assert torch.equal(*found)
    assert not torch.allclose(found[0], logits(lora_of(), batch), atol=1e-2)


def test_adapters_take_turns(lora_of, draw, batch, fused_calls) -> None:
    """Of other rank and kind; the second one targets fewer layers."""
    found = {}
    for kernel in ("exact", "peft"):
        model = two_adapters(lora_of, draw, kernel, target_modules=["q_proj"])
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            found.setdefault(name, []).append(logits(model, batch))
    for results in found.values():
        for result in results[1:]:
            same(result, results[0])
    assert len(fused_calls) == 2 * (2 * len(TARGETS) + 1)
    assert not torch.allclose(found["default"][0], found["second"][0], atol=1e-2)


def test_a_batch_of_mixed_adapters_runs_as_in_peft(lora_of, draw, batch, fused_calls) -> None:
    found = []
    for kernel in ("exact", "peft"):
        model = two_adapters(lora_of, draw, kernel).eval()
        found.append(logits(model, batch, adapter_names=["second", "__base__"]))
    assert not fused_calls
    assert torch.equal(*found)


@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safe_merge"])
def test_merging(lora_of, batch, fused_calls, safe) -> None:
    model = lora_of()
    adapted = logits(model, batch)
    model.merge_adapter(safe_merge=safe)
    fused_calls.clear()
    same(logits(model, batch), adapted)
    assert not fused_calls
    model.unmerge_adapter()
    same(logits(model, batch), adapted)
    assert fused_calls
    merged = model.merge_and_unload(safe_merge=safe)
    assert not layers(merged)
    same(logits(merged, batch), adapted)


def test_delete_and_unload(lora_of, draw, base_of, batch) -> None:
    model = two_adapters(lora_of, draw, "exact")
    model.set_adapter("second")
    expected = logits(model, batch)
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(model.unload(), batch), logits(base_of(), batch))


def test_scaling_that_changes_later(lora_of, batch) -> None:
    """PEFT lets one scale an adapter after the fact; a DoRA norm depends on it."""
    found = []
    for kernel in ("exact", "peft"):
        model = lora_of(kernel)
        before = logits(model, batch)
        with rescale_adapter_scale(model, 3.0):
            found.append(logits(model, batch))
        same(logits(model, batch), before)
    same(*found)
    assert not torch.allclose(found[1], before, atol=1e-2)


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about what it is given
@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        pytest.param({"lora_bias": True}, True, id="LoRA with bias"),
        pytest.param({"rank_pattern": {"q_proj": 2}}, False, id="ranks by layer"),
    ],
)
def test_options_of_plain_lora(
    base_of, draw, batch, fused_calls, changes, refused, tmp_path: Path
) -> None:
    found = []
    for kernel in ("exact", "peft"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)
        base = base_of()
        for module in base.modules():
            if isinstance(module, nn.Linear) and "lora_bias" in changes:
                module.bias = nn.Parameter(torch.ones(module.out_features))
        model = get_peft_model(base, config)
        draw(model)
        set_kernel(model, kernel)
        found.append(logits(model.eval(), batch))
    same(*found)
    assert bool(fused_calls) != refused


def test_frozen_weight_that_is_trained_gets_its_gradient(lora_of, batch, fused_calls) -> None:
    """Unfrozen by hand: the fused pass has no gradient for it, so PEFT's runs."""
    found = []
    for kernel in ("exact", "peft"):
        model = lora_of(kernel)
        weights = [layer.base_layer.weight.requires_grad_() for layer in layers(model)]
        model(**batch).loss.backward()
        assert all(weight.grad.abs().max() > 0 for weight in weights)
        found.append(weights[0].grad)
    assert torch.equal(*found)
    assert not fused_calls


def test_layers_of_another_kind_keep_their_class(use_dora) -> None:
    """Embeddings, convolutions, and subclasses that quantised layers come from."""

    class Special(stock.Linear):
        pass

    model = nn.ModuleDict(
        {"proj": nn.Linear(6, 4), "other": nn.Linear(6, 4), "conv": nn.Conv2d(3, 3, 1)}
    )
    model["tokens"] = nn.Embedding(5, 6)
    model["transposed"] = Conv1D(4, 6)
    names = list(model)
    holder = nn.ModuleDict({"inner": model})
    config = LoraConfig(r=2, target_modules=names, use_dora=use_dora, fan_in_fan_out=False)
    inject_adapter_in_model(config, holder)
    model["other"].__class__ = Special
    before = {name: type(model[name]) for name in names}
    x = torch.randn(3, 6)
    expected = model["transposed"](x)
    set_kernel(holder, "exact")
    assert type(model["proj"]) is FusedLinear
    for name in ("other", "conv", "tokens"):
        assert type(model[name]) is before[name], name
    assert torch.equal(model["transposed"](x), expected)
    set_kernel(holder, "peft")
    assert {name: type(model[name]) for name in names} == before


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about names of methods
def test_checkpointing_draws_the_same_masks_again(lora_of, batch) -> None:
    found = []
    for checkpointed in (False, True):
        model = lora_of(lora_dropout=0.3).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        model(**batch, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, again = found
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
