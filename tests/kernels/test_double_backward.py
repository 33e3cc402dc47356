"""A second derivative through a function with its own backward pass is refused.

That pass computes numbers without a graph: the second derivative would lack terms without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_lora import among_several, by_itself
from torch import Tensor

import mixlora_exp.kernels
from mixlora_exp.kernels import Frozen
from mixlora_exp.kernels.loss import linear_cross_entropy
from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.mixlora.grouped import grouped_stage
from mixlora_exp.kernels.shapes import Low, low_ranks

# The output of a function and an input, between which no other function with a pass of its own is.
Derived = tuple[Tensor, Tensor]


class Plain(Frozen):
    """A frozen weight that is made at each use, as a quantised one is."""

    def weight(self) -> Tensor:
        return torch.ones(3, 4)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def product() -> Derived:
    x = leaf(2, 4)
    return Plain().linear(x), x


def linear(compute: Callable[[Tensor, Tensor, LowRankPart], Tensor]) -> Derived:
    a = leaf(2, 4)
    return compute(torch.randn(5, 4), torch.randn(3, 4), LowRankPart(a, leaf(3, 2), 1.5)), a


def cross_entropy() -> Derived:
    hidden = leaf(3, 4)
    return linear_cross_entropy(hidden, torch.randn(7, 4), torch.tensor([0, 6, 2])), hidden


def made_block(block, kernel: Callable, name: str) -> Derived:
    leaves = {key: value.float().requires_grad_() for key, value in block.values.items()}
    made = block.block(leaves, torch.float32, torch.float32)
    return kernel(leaves["x"], block.route(leaves["x"], leaves["router"]), made), leaves[name]


def scaled_sum(block) -> Derived:
    outputs = leaf(18, 12)  # Of the down projection, for each filled slot.

    def finished(x: Tensor, routing, made) -> Tensor:
        gate, up = made.gate.frozen.linear(x), made.up.frozen.linear(x)
        return grouped_stage(x, gate, up, routing, made)[1](outputs)

    return made_block(block, finished, "x")[0], outputs


def held_low_rank(block) -> Derived:
    def kept(x: Tensor, routing, made) -> Tensor:
        held = Low(*(getattr(made.gate.experts, name).detach() for name in ("a", "b")), None)
        gate = replace(made.gate, experts=replace(made.gate.experts, low=held))
        return low_ranks(replace(made, gate=gate), x.dtype)["gate"].a

    return made_block(block, kept, "gate.a")


def triton_block(block) -> Derived:
    pytest.importorskip("triton")
    from triton_cases import fused

    return made_block(block, fused, "gate.a")


def triton_router() -> Derived:
    pytest.importorskip("triton")
    from triton_cases import DEVICE, triton_router

    router = torch.randn(4, 12, device=DEVICE, requires_grad=True)
    x = torch.randn(9, 12, device=DEVICE)
    return triton_router.route_triton(x, router, 2).weights, router


@pytest.fixture
def derived(block_of, plain, exact_forms) -> dict[str, Callable[[], Derived]]:
    lora, dora = block_of(plain, 0), block_of(replace(plain, dora=True), 0)
    grouped, dense = exact_forms["exact, grouped"], exact_forms["exact, dense"]
    return {
        "_Product": product,
        "_LoraLinears": lambda: linear(by_itself),
        "_LoraAdd": lambda: linear(among_several),
        "_LinearCrossEntropy": cross_entropy,
        "_Recomputed": lambda: made_block(lora, dense, "gate.a"),
        "_GroupedHidden": lambda: made_block(lora, grouped, "gate.a"),
        "_ScaledSum": lambda: scaled_sum(dora),
        "_InPlaceOf": lambda: held_low_rank(lora),
        "_Block": lambda: triton_block(lora),
        "_Route": triton_router,
    }


def written() -> list[str]:
    """The functions with their own backward pass, as the kernels' source has them."""
    files = sorted(Path(mixlora_exp.kernels.__file__).parent.rglob("*.py"))
    pattern = re.compile(r"^class (\w+)\(torch\.autograd\.Function\)", re.MULTILINE)
    return [name for file in files for name in pattern.findall(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", written())
def test_second_derivative_is_refused(derived, name) -> None:
    y, variable = derived[name]()
    upstream = torch.ones_like(y).requires_grad_()
    (gradient,) = torch.autograd.grad(y, variable, upstream, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiate twice .*once_differentiable"):
        gradient.sum().backward()
