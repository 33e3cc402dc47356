"""Row norms of DoRA in whole models: computed once per optimizer step, and right at any time."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from mixlora_exp.adapters import MixLoraFeedForward, dora_norms, set_kernel, weight_cache
from mixlora_exp.adapters.linear import FusedLinear

EXPERTS, PLAIN = 6, 8
"""Norms of the tiny model: of experts in 2 layers' 3 projections, of 4 more in attention."""


@pytest.fixture
def norm_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each computation: "norm", and "frozen" for ||W||^2."""
    calls: list[str] = []
    counted_names = (
        (dora_norms, "dora_norms", "norm"),
        (weight_cache, "squared_row_norms", "frozen"),
    )
    for module, name, label in counted_names:
        real = getattr(module, name)

        def counted(*args: Any, real: Callable = real, label: str = label) -> Tensor:
            calls.append(label)
            return real(*args)

        monkeypatch.setattr(module, name, counted)
    return calls


@pytest.fixture
def model(model_of) -> PeftModel:
    made = model_of(use_dora=True)
    set_kernel(made, "exact")
    return made


def expected_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (weight.double() + scaling * b.double() @ a.double()).norm(dim=-1).float()


def check_norms(model: nn.Module) -> None:
    """All norms in use are those of the whole matrices."""
    seen = 0
    for module in model.modules():
        if isinstance(module, MixLoraFeedForward):
            block = module.block("default", 1, torch.float32)
            for role, projection in block.projections.items():
                weight = getattr(module.base_layer, f"{role}_proj").weight
                a, b = (getattr(module, f"lora_{part}_{role}")["default"] for part in "AB")
                expected = expected_norm(weight, a, b, module.scaling["default"])
                torch.testing.assert_close(projection.experts.norm, expected)
                seen += 1
        elif isinstance(module, FusedLinear):
            source, made = weight_cache.cached_weights(module, "default", torch.float32)
            expected = expected_norm(source.weight, source.a, source.b, source.scaling)
            torch.testing.assert_close(made.norm, expected)
            seen += 1
    assert seen == EXPERTS + PLAIN


OPTIMIZERS = [
    pytest.param(lambda w: torch.optim.AdamW(w, lr=1e-2), id="AdamW"),
    pytest.param(
        lambda w: torch.optim.AdamW(w, lr=1e-2, fused=True), id="fused, which raises no version"
    ),
    pytest.param(lambda w: torch.optim.SGD(w, lr=1e-2, momentum=0.9), id="SGD"),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_norms_are_computed_once_per_optimizer_step(
    model, batch, norm_calls, make_optimizer
) -> None:
    model.train()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    norm_calls.clear()
    for step in range(1, 4):
        for _ in range(3):  # micro-batches, before each of which a trainer calls train()
            model.train()
            model(**batch).loss.backward()
            assert norm_calls.count("norm") == step * (EXPERTS + PLAIN)
        check_norms(model)
        optimizer.step()
        optimizer.zero_grad()
    # Frozen weights are read once.
    assert norm_calls.count("frozen") == EXPERTS + PLAIN
    model(**batch)
    check_norms(model)


@torch.no_grad()
def change_in_place(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.add_(0.05)


@torch.no_grad()
def load_other_values(model: nn.Module) -> None:
    state = {name: value * 1.5 for name, value in model.state_dict().items() if "lora_" in name}
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def assign_other_values(model: nn.Module) -> None:
    state = {name: value * 1.5 for name, value in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False, assign=True)


def step_of_a_fused_optimizer(model: nn.Module) -> None:
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, lr=1e-2, fused=True).step()


@torch.no_grad()
def written_past_autograd(model: nn.Module) -> None:
    """By `.data`, after which `train()` or `eval()` is asked for."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.05)
    model.eval()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change_in_place, id="in place under no_grad"),
        pytest.param(load_other_values, id="load_state_dict, into the tensors"),
        pytest.param(assign_other_values, id="load_state_dict, other tensors"),
        pytest.param(step_of_a_fused_optimizer, id="a step of fused AdamW"),
        pytest.param(written_past_autograd, id="through .data, then eval()"),
    ],
)
def test_norms_follow_a_change_in_evaluation(model, batch, norm_calls, change) -> None:
    """And between changes they are computed once for any number of passes."""
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        norm_calls.clear()
        for _ in range(3):
            assert torch.equal(model(**batch).logits, before)
    assert norm_calls == []
    change(model)
    with torch.no_grad():
        for _ in range(2):
            after = model(**batch).logits
    assert norm_calls.count("norm") == EXPERTS + PLAIN
    check_norms(model)
    set_kernel(model, "peft")  # whose norms are computed in each pass
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_scoring_between_steps_leaves_nothing_behind(model, batch) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        with torch.inference_mode():
            model.eval()(**batch)
        model.train()(**batch).loss.backward()
        optimizer.step()
        check_norms(model)


def test_a_copy_has_its_own_norms(model, batch) -> None:
    with torch.no_grad():
        model.eval()(**batch)
    copy = deepcopy(model)
    change_in_place(copy)
    copy(**batch)
    check_norms(copy)
    check_norms(model)


def test_model_built_in_inference_mode_can_score(model_of, batch) -> None:
    """Its tensors have no version, so norms cannot be kept."""
    expected = model_of(use_dora=True).eval()(**batch).logits
    with torch.inference_mode():
        model = model_of(use_dora=True).eval()
        set_kernel(model, "exact")
        for _ in range(2):
            found = model(**batch).logits
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
