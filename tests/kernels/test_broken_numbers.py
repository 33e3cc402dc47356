"""NaN and infinity reach what is computed from them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels import route
from mixlora_exp.kernels.mixlora.exact import mixlora_exact_dense, mixlora_exact_grouped
from mixlora_exp.kernels.mixlora.reference import mixlora_reference
from mixlora_exp.kernels.mixlora.shared import mixlora_shared
from mixlora_exp.kernels.mixlora.stock import mixlora_stock

KERNELS = {
    "reference": mixlora_reference,
    "peft": mixlora_stock,
    "shared": mixlora_shared,
    "exact, grouped": mixlora_exact_grouped,
    "exact, dense": mixlora_exact_dense,
}
BROKEN = [
    pytest.param(float("nan"), id="NaN"),
    pytest.param(float("inf"), id="infinity"),
]


@pytest.fixture(params=KERNELS.values(), ids=KERNELS.keys())
def kernel(request: pytest.FixtureRequest) -> Callable:
    return request.param


PARTS = [
    pytest.param(False, "a", id="LoRA, A"),
    pytest.param(False, "b", id="LoRA, B"),
    pytest.param(True, "a", id="DoRA, A"),
    pytest.param(True, "b", id="DoRA, B"),
    pytest.param(True, "magnitude", id="DoRA, magnitude"),
]


def outputs(block, kernel: Callable, masks, **changed: Tensor) -> tuple[Tensor, Tensor]:
    """(y, chosen experts) with some of the values changed; x is routed as it is."""
    values = {**block.values, **changed}
    routing = route(values["x"], values["router"], block.case.top_k)
    feed_forward = block.block(values, torch.float64, torch.float64, masks=masks)
    with torch.no_grad():
        return kernel(values["x"], routing, feed_forward), routing.experts


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_broken_token_leaves_the_others_alone(
    block_of, plain, kernel, dora, broken, dropout, tiny_blocks
) -> None:
    """A padding row may hold NaN. The token itself must not look sound."""
    tiny_blocks(8)
    block = block_of(replace(plain, dora=dora), 0)
    masks = block.masks(dropout)
    x = block.values["x"].clone()
    x[3] = broken
    (sound, _), (found, _) = (outputs(block, kernel, masks, x=v) for v in (block.values["x"], x))
    others = torch.arange(len(x)) != 3
    torch.testing.assert_close(found[others], sound[others], rtol=1e-12, atol=1e-12)
    assert found[3].isnan().all()


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        pytest.param(float("nan"), True, id="NaN throughout"),
        pytest.param(float("inf"), False, id="one infinite element"),
    ],
)
@pytest.mark.parametrize("role", ["gate", "up", "down"])
@pytest.mark.parametrize(("dora", "part"), PARTS)
def test_a_broken_expert_reaches_its_tokens_only(
    block_of, plain, kernel, dora, part, role, broken, whole, dropout
) -> None:
    """One expert may diverge; tokens of the others must not see it."""
    block = block_of(replace(plain, tokens=24, dora=dora), 0)
    masks = block.masks(dropout)
    value = block.values[f"{role}.{part}"].clone()
    value[1].view(-1)[slice(None) if whole else slice(0, 1)] = broken
    sound, experts = outputs(block, kernel, masks)
    found, _ = outputs(block, kernel, masks, **{f"{role}.{part}": value})
    chosen = (experts == 1).any(dim=-1)
    assert 3 < chosen.sum() < 21
    torch.testing.assert_close(found[~chosen], sound[~chosen], rtol=1e-12, atol=1e-12)
    # No token of the expert is as it was; nor is it all finite, where a mask has not hidden it.
    seen = ~found[chosen].isfinite().all(dim=-1)
    assert seen.all() if dropout == 0.0 and whole else seen.any()


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("role", ["gate", "up", "down"])
@pytest.mark.parametrize(("dora", "part"), PARTS)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "exact, dense"])
def test_gradients_of_other_experts_stay_sound(
    block_of, plain, name, dora, part, role, broken
) -> None:
    """If only tokens that avoid a broken expert count in the loss, all other experts' gradients
    are those of a sound block. The dense form, whose products run over the columns of all experts,
    does not promise it."""
    kernel = KERNELS[name]
    block = block_of(replace(plain, tokens=24, dora=dora), 0)
    value = block.values[f"{role}.{part}"].clone()
    value[1] = broken
    chosen = (outputs(block, mixlora_reference, None)[1] == 1).any(dim=-1)
    upstream = torch.where(chosen.unsqueeze(-1), 0.0, block.upstream)
    sound = replace(block, upstream=upstream)
    hurt = replace(sound, values={**block.values, f"{role}.{part}": value})
    truth, found = (b.run(kernel, torch.float64) for b in (sound, hurt))
    others = torch.arange(4) != 1
    for key, gradient in found.items():
        if key in ("x", "y", "router"):
            continue
        torch.testing.assert_close(
            gradient[others], truth[key][others], rtol=1e-9, atol=1e-10, msg=key
        )
    torch.testing.assert_close(found["x"][~chosen], truth["x"][~chosen], rtol=1e-9, atol=1e-10)
