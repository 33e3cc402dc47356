"""The backward passes written by hand against finite differences, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from one_lora import among_several, by_itself

from mixlora_exp.kernels import DropMask, Routing, draw_mask
from mixlora_exp.kernels.low_rank import LowRankPart

CASES = [
    pytest.param({}, id="LoRA"),
    pytest.param({"dora": True}, id="DoRA"),
    pytest.param({"dora": True, "roles": ("down",)}, id="DoRA on down only"),
    pytest.param({"roles": ("gate", "up")}, id="no experts on down"),
    pytest.param({"activation": "gelu_tanh"}, id="an activation with a name"),
    pytest.param({"activation": torch.tanh}, id="an activation without a name"),
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_block(block_of, plain, exact_form, tiny_blocks, fresh_seed, changes, dropout) -> None:
    """Of x, the router's weights and all adapters; the choice of experts is fixed."""
    tiny_blocks(6)
    case = replace(plain, tokens=5, hidden=4, inner=6, experts=3, rank=2, **changes)
    block = block_of(case, fresh_seed)
    masks = block.masks(dropout)
    experts = torch.rand(5, 3).argsort(dim=-1)[:, :2]
    weights = (torch.rand(5, 2) + 0.2).double().requires_grad_()
    names = [name for name in block.values if name not in ("x", "router")]
    inputs = [block.values[name].clone().requires_grad_() for name in ("x", *names)]

    def compute(weights, x, *adapters):
        feed_forward = block.block(
            dict(zip(names, adapters, strict=True)), torch.float64, torch.float64, masks=masks
        )
        probabilities = torch.zeros(5, 3, dtype=torch.float64)
        return exact_form(x, Routing(probabilities, probabilities, experts, weights), feed_forward)

    assert len(inputs) == 1 + len(case.roles) * (3 if case.dora else 2)
    # Along random directions; all elements one by one would take half a minute.
    assert torch.autograd.gradcheck(compute, (weights, *inputs), fast_mode=True)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA, the norm a constant"])
@pytest.mark.parametrize("held", ["no mask", "sparse", "bool"])
@pytest.mark.parametrize("linear", [by_itself, among_several])
def test_linear(fresh_seed, dora, held, linear) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    weight, norm = draw(5, 6), draw(5).abs() + 0.5
    mask = None if held == "no mask" else draw_mask((4, 6), 0.4, torch.device("cpu"))
    if held == "bool":
        mask = DropMask(mask.kept(), mask.scale, mask.shape)
    inputs = [draw(4, 6), draw(2, 6), draw(5, 2), *([draw(5)] if dora else [])]

    def compute(x, a, b, magnitude=None):
        given = None if magnitude is None else norm
        return linear(x, weight, LowRankPart(a, b, 1.7, magnitude, given, mask))

    assert torch.autograd.gradcheck(compute, [tensor.requires_grad_() for tensor in inputs])
