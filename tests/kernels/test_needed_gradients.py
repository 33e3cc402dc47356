"""Each kernel gives gradients to whatever asks for them, and needs nothing else to ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from one_lora import by_itself
from torch import Tensor

from mixlora_exp.kernels import KERNELS, draw_mask
from mixlora_exp.kernels.lora_many import lora_add, lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def subsets(names: list[str], sizes: set[int]) -> Iterator[tuple[str, ...]]:
    for size in sorted(sizes):
        yield from combinations(names, size)


def few(names: list[str]) -> set[int]:
    """None, one or two inputs alone, and all but one: what quick tests take."""
    return {0, 1, 2, len(names) - 1}


def every(names: list[str]) -> set[int]:
    return set(range(len(names) + 1))


def check(
    compute: Callable[[dict[str, Tensor]], Tensor],
    definition: Callable[[dict[str, Tensor]], Tensor],
    values: dict[str, Tensor],
    sizes: Callable[[list[str]], set[int]],
) -> None:
    """The gradients of each subset of `values` alone are those of the definition for all."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    y = definition(leaves)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    truth = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True))
    for needed in subsets(list(values), sizes(list(values))):
        leaves = {n: value.clone().requires_grad_(n in needed) for n, value in values.items()}
        found = compute(leaves)
        torch.testing.assert_close(found, y, **CLOSE)
        assert found.requires_grad == bool(needed)
        if needed:
            found.backward(upstream)
        for name, leaf in leaves.items():
            if name not in needed:
                assert leaf.grad is None, (needed, name)
                continue
            torch.testing.assert_close(
                leaf.grad,
                truth[name],
                **CLOSE,
                msg=lambda m, n=name, s=needed: f"{n} of {s}: {m}",
            )


def check_block(block, form, sizes, masks=None) -> None:
    def run(kernel) -> Callable[[dict[str, Tensor]], Tensor]:
        def compute(leaves: dict[str, Tensor]) -> Tensor:
            made = block.block(leaves, torch.float64, torch.float64, masks=masks)
            return kernel(leaves["x"], block.route(leaves["x"], leaves["router"]), made)

        return compute

    check(run(form), run(KERNELS["reference"]), block.values, sizes)


SHAPES = [
    pytest.param({}, id="LoRA"),
    pytest.param({"dora": True}, id="DoRA"),
    pytest.param({"dora": True, "roles": ("down",)}, id="DoRA on down only"),
    pytest.param({"roles": ("down",)}, id="LoRA on down only"),
    pytest.param({"dora": True, "roles": ("gate",)}, id="DoRA on gate only"),
    pytest.param({"dora": True, "roles": ("up", "down")}, id="DoRA on up and down"),
    pytest.param(
        {"dora": True, "biased": ("gate", "up", "down"), "normalised": False}, id="DoRA and bias"
    ),
]
SMALL = {"tokens": 3, "hidden": 4, "inner": 5, "experts": 3, "rank": 2}


@pytest.mark.parametrize("options", SHAPES)
def test_block(block_of, plain, form, options, fresh_seed) -> None:
    check_block(block_of(replace(plain, **SMALL, **options), fresh_seed), form, few)


@pytest.mark.parametrize("options", SHAPES)
def test_block_under_dropout(block_of, plain, masked_form, options, fresh_seed) -> None:
    block = block_of(replace(plain, **SMALL, **options), fresh_seed)
    check_block(block, masked_form, few, block.masks(0.4))


@pytest.mark.slow
@pytest.mark.parametrize("options", SHAPES)
def test_block_by_every_subset(block_of, plain, form, options, fresh_seed) -> None:
    block = block_of(replace(plain, **SMALL, **options), fresh_seed)
    check_block(block, form, every)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("p", [0.0, 0.4], ids=["no dropout", "dropout"])
def test_linear_layers(fresh_seed, dora, p) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    weight, norms = draw(4, 6), draw(2, 4).abs() + 1
    masks = [draw_mask((3, 6), p, torch.device("cpu")) for _ in range(2)]

    def part(leaves: dict[str, Tensor], i: int) -> LowRankPart:
        norm = norms[i] if dora else None
        own = (leaves[f"a{i}"], leaves[f"b{i}"], 1.5, leaves.get(f"m{i}"), norm)
        return LowRankPart(*own, masks[i])

    def values(*indices: int) -> dict[str, Tensor]:
        made = {}
        for i in indices:
            made |= {
                f"a{i}": draw(2, 6),
                f"b{i}": draw(4, 2),
                **({f"m{i}": draw(4)} if dora else {}),
            }
        return made

    check(
        lambda leaves: by_itself(leaves["x"], weight, part(leaves, 0)),
        lambda leaves: lora_add_reference(leaves["x"] @ weight.T, leaves["x"], part(leaves, 0)),
        {"x": draw(3, 6), **values(0)},
        every,
    )
    for count in (1, 2):

        def run(compute, count=count) -> Callable[[dict[str, Tensor]], Tensor]:
            return lambda leaves: compute(
                leaves["y"], leaves["x"], *(part(leaves, i) for i in range(count))
            )

        inputs = {"y": draw(3 * count, 4), "x": draw(3 * count, 6), **values(*range(count))}
        check(run(lora_add), run(lora_add_reference), inputs, every)
