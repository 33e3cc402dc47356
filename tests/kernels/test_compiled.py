"""Under `torch.compile`, as one graph: the same numbers as without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mixlora_exp.kernels import draw_mask
from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.lora_many import lora_add, lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.mixlora.exact import mixlora_exact

# `aot_eager` starts from the graph that `eager` would run.
BACKENDS = [
    pytest.param("aot_eager", id="traced with the backward pass"),
    pytest.param("inductor", id="compiled", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "p"),
    [
        pytest.param({}, 0.0, id="LoRA"),
        pytest.param({"activation": "silu"}, 0.7, id="an activation by name, dropout"),
        pytest.param({"dora": True}, 0.7, id="DoRA, dropout"),
        pytest.param({"roles": ("down",)}, 0.0, id="experts on down only"),
        pytest.param({"activation": torch.nn.functional.mish}, 0.0, id="an unnamed activation"),
    ],
)
def test_exact_is_one_graph_with_the_same_results(
    block_of, plain, same, backend, changes, p
) -> None:
    """Output and gradients in float64; fullgraph=True raises where the graph would break."""
    block = block_of(replace(plain, **changes), 0)
    torch.manual_seed(0)
    masks = block.masks(p)
    compiled = torch.compile(mixlora_exact, backend=backend, fullgraph=True)
    found = block.run(compiled, torch.float64, masks=masks)
    same(found, block.run("exact", torch.float64, masks=masks))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_compiled_form_does_not_depend_on_the_routing(block_of, plain, same, dora) -> None:
    """Compiled once for all: an expert without tokens, all tokens to two, and more tokens."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(mixlora_exact, backend=count, fullgraph=True, dynamic=False)
    for seed, pushed in enumerate(({}, {2: -60.0}, {1: 60.0, 3: 60.0})):
        block = block_of(replace(plain, dora=dora, pushed=pushed), seed)
        same(block.run(compiled, torch.float64), block.run("exact", torch.float64))
    assert len(graphs) == 1
    wider = block_of(replace(plain, dora=dora, tokens=17), 0)
    same(wider.run(compiled, torch.float64), wider.run("exact", torch.float64))
    assert len(graphs) == 2


@pytest.mark.parametrize("p", [0.05, 0.7])
def test_a_mask_drawn_inside_a_graph(p) -> None:
    """It has no shape that depends on the data, so it is a bool per element."""
    sparse = []

    def compute(x):
        mask = draw_mask(x.shape, p, x.device)
        sparse.append(mask.is_sparse)
        return drop(x, mask)

    x = torch.ones(200, 300)
    torch.manual_seed(0)
    y = torch.compile(compute, backend="aot_eager", fullgraph=True)(x)
    assert sparse == [False]
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=6 * 0.5 / 60_000**0.5)
    assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_fused_linear_is_one_graph(backend, dora) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape).double().requires_grad_() for shape in ((9, 7), (2, 7), (5, 2))]
    weight, norm = torch.randn(5, 7).double(), torch.rand(5).double() + 1
    magnitude = torch.rand(5).double().requires_grad_() if dora else None
    mask = draw_mask((9, 7), 0.7, torch.device("cpu"))
    found = []
    for compute in (
        torch.compile(lora_add, backend=backend, fullgraph=True),
        lora_add_reference,
    ):
        x, a, b = leaves
        part = LowRankPart(a, b, 1.7, magnitude, norm if dora else None, mask)
        y = compute(x @ weight.T, x, part)
        wanted = [*leaves, *([magnitude] if dora else [])]
        found.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
