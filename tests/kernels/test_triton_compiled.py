"""The Triton kernels under `torch.compile`: they are in the graph, with the results of eager mode.

The operators are closed, so that the compiler leaves them as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, GPU, on_device, triton_block, triton_router

NAMES = "mixlora" if GPU else "mixlora_interpreted"
# `aot_eager` starts from the graph that `eager` would run, and traces the backward pass too.
BACKENDS = ["aot_eager", *(["inductor"] if GPU else [])]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dora", [pytest.param(False, id="LoRA", marks=pytest.mark.slow), pytest.param(True, id="DoRA")]
)
def test_one_graph_with_the_operators_in_it(block_of, plain, backend, dora) -> None:
    """Router and block, output and gradients, to the bit; fullgraph=True raises where the graph
    would break."""
    block = block_of(replace(plain, activation="silu", dora=dora), 0, torch.float32)
    masks = block.masks(0.3, hashed=True)
    moved = {
        name: {role: value.to(DEVICE) for role, value in getattr(block, name).items()}
        for name in ("frozen", "norms", "biases")
    }
    block = replace(block, **moved)
    held = on_device(block.block(block.values, torch.float32, torch.float32, masks=masks))
    masks = type(masks)(held.x_mask, held.hidden_mask)
    upstream = block.upstream.to(DEVICE, torch.float32)
    real = torch.arange(9, device=DEVICE) != 2
    seen: Counter[str] = Counter()

    def look(module, inputs):
        graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
        for node in (node for graph in graphs for node in graph.nodes):
            seen[str(node.target).removeprefix(f"{NAMES}.").removesuffix(".default")] += 1
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def step(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        made = block.block(leaves, torch.float32, torch.float32, masks=masks)
        routing = triton_router.route_triton(leaves["x"], leaves["router"], 2, real)
        y = triton_block.fused_block(routing.rows, routing, made)
        return y, routing.extra["report"].sum(dim=0)

    found = []
    for run in (step, torch.compile(step, backend=look, fullgraph=True)):
        leaves = {n: v.to(DEVICE, torch.float32).requires_grad_() for n, v in block.values.items()}
        y, report = run(leaves)
        wanted = list(leaves.values())
        gradients = torch.autograd.grad([y, report[2]], wanted, [upstream, torch.ones(4)])
        found.append([y, report, *gradients])
    assert {"route", "order", "hidden_forward", "from_columns"} <= set(seen)
    assert not seen["one_hot"]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_decoder_layer_keeps_the_kernels(tmp_path) -> None:
    """As compiled for a GPU: each operator is in the graph as often as a pass launches it, and
    nothing of the dense form is."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "triton_graph.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    mixlora, mixdora = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    check_graphs(mixlora, "")
    check_graphs(mixdora, "scaled_")


def check_graphs(graphs: dict[str, dict[str, int]], down: str) -> None:
    """`down`: how the names of the down projection's operators begin."""
    operators = {
        "forward": ["route", "order", "to_columns", "hidden_forward", f"{down}from_columns"],
        "backward": [
            f"{down}to_columns",
            f"{down}matrix_gradients",
            "hidden_backward_inner",
            "hidden_backward_tokens",
            "from_columns",
            "matrix_gradients",
            "route_backward",
        ],
    }
    for part, names in operators.items():
        found = {n: c for n, c in graphs[part].items() if n.startswith("mixlora.")}
        assert found == Counter(f"mixlora.{name}.default" for name in names)
        assert not {"aten.topk.default", "aten.sort.stable", "aten.where.self"} & set(graphs[part])
