"""The kernels and their dropout in whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from cpu_kernels import CPU_KERNELS
from peft.tuners.lora import LoraLayer

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.linear import FusedLinear, ReferenceLinear, StockLinear


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_dropout_acts_in_training_and_not_in_evaluation(model_of, batch, dora, kernel) -> None:
    model = model_of(use_dora=dora, lora_dropout=0.3)
    set_kernel(model, kernel)
    model.train()
    torch.manual_seed(0)
    first = logits(model, batch)
    assert not torch.equal(logits(model, batch), first)
    torch.manual_seed(0)
    assert torch.equal(logits(model, batch), first)
    model.eval()
    assert torch.equal(logits(model, batch), logits(model, batch))
    without = model_of(use_dora=dora, lora_dropout=0.0).eval()
    set_kernel(without, kernel)
    assert torch.equal(logits(model, batch), logits(without, batch))


@pytest.mark.parametrize(
    ("targets", "drawn"),
    [
        pytest.param(["gate_proj", "up_proj", "down_proj"], {"x", "hidden"}, id="all"),
        pytest.param(["up_proj"], {"x"}, id="no hidden state is dropped from without down"),
        pytest.param(["down_proj"], {"hidden"}, id="nor x without gate and up"),
    ],
)
@pytest.mark.parametrize("kernel", ["exact", "peft"])
def test_masks_are_drawn_for_what_has_experts(model_of, targets, drawn, kernel) -> None:
    """By the block, in training alone; `peft` is given the probability and draws its own."""
    block = model_of(target_modules=targets, lora_dropout=0.25).base_model.feed_forwards()[0]
    block.kernel = kernel
    made = block.train().block("default", 30, torch.float32)
    masks = {name: getattr(made, f"{name}_mask") for name in ("x", "hidden")}
    assert {name for name, mask in masks.items() if mask} == (drawn if kernel == "exact" else set())
    assert made.dropout == 0.25
    for name, mask in masks.items():
        if mask is not None:
            assert mask.shape == (30, {"x": 64, "hidden": 176}[name])
            assert mask.scale == pytest.approx(4 / 3)
    evaluated = block.eval().block("default", 30, torch.float32)
    assert (evaluated.dropout, evaluated.x_mask, evaluated.hidden_mask) == (0.0, None, None)


def test_kernels_agree_on_a_whole_model(model_of, batch, family, dora) -> None:
    model = model_of(family, use_dora=dora).eval()
    assert set_kernel(model, "auto") == "exact"
    exact = logits(model, batch)
    for kernel in ("reference", "peft", "shared"):
        assert set_kernel(model, kernel) == kernel
        torch.testing.assert_close(logits(model, batch), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="kernel=fast is unknown"):
        set_kernel(model, "fast")
    assert {block.kernel for block in model.base_model.feed_forwards()} == {"shared"}


@pytest.mark.parametrize(
    ("kernel", "attention"),
    [
        pytest.param("peft", StockLinear, id="peft"),
        pytest.param("reference", ReferenceLinear, id="reference"),
        pytest.param("exact", FusedLinear, id="exact"),
    ],
)
def test_kernel_stays_when_an_adapter_is_added(model_of, config_of, kernel, attention) -> None:
    """On attention as on the experts, and also on layers that the second adapter adds."""
    model = model_of(target_modules=["q_proj", "up_proj"])
    set_kernel(model, kernel)
    model.add_adapter("second", config_of(target_modules=["q_proj", "v_proj", "up_proj"]))
    assert {block.kernel for block in model.base_model.feed_forwards()} == {kernel}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 4
    assert {type(layer) for layer in layers} == {attention}


def test_training_under_autocast(model_of, batch, dora) -> None:
    """All kernels run on float32 weights where autocast makes the products bf16."""
    losses = []
    for kernel in CPU_KERNELS:
        model = model_of(use_dora=dora).train()
        set_kernel(model, kernel)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        losses.append(loss.item())
    assert losses == pytest.approx([losses[0]] * 4, rel=0.02)


def test_model_can_be_copied_after_a_pass(model_of, batch) -> None:
    """What the layers remember of a pass must not hold its graph."""
    model = model_of().train()
    model(**batch).loss.backward()
    copied = copy.deepcopy(model).eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(copied(**batch).logits, model(**batch).logits)
