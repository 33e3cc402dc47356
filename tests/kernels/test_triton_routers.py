"""The Triton block under each registered router, among them those whose rows have different numbers
of experts, padded to the largest: compiled on a GPU, elsewhere by Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_cases import fused

from mixlora_exp.kernels import KERNELS, ROUTERS, make_router
from mixlora_exp.kernels.mixlora.stage import with_base

# Rows without a place, and thresholds that some experts reach and others do not.
OPTIONS = {"top_p": {"p": 0.9}, "switch": {"capacity_factor": 0.5}, "threshold": {"t_max": 0.3}}


# The interpreter takes seconds for each; `test_triton.py` has rows of K and of all experts.
@pytest.mark.parametrize(
    ("name", "dora"),
    [
        pytest.param(name, dora, marks=[] if name in OPTIONS and not dora else pytest.mark.slow)
        for name in ROUTERS
        for dora in (False, True)
    ],
)
def test_as_by_the_definition(block_of, plain, name, dora) -> None:
    """Output and every gradient in float32, against the reference in float64; two rows of nine are
    padding."""
    block = block_of(replace(plain, experts=3, dora=dora), 0, torch.float32)
    settings = {"num_experts": 3, "top_k": 2, "init_std": 0.5}
    own = make_router(name, settings, OPTIONS.get(name, {}))
    torch.manual_seed(0)
    values = {n: v for n, v in block.values.items() if n != "router"}
    values |= {f"router {n}": weight for n, weight in own.initial(12).items()}
    mask = torch.arange(9) < 7
    found, experts = [], []
    for run, dtype in ((fused, torch.float32), (KERNELS["reference"].run, torch.float64)):
        leaves = {n: v.to(dtype, copy=True).requires_grad_() for n, v in values.items()}
        held = {n.removeprefix("router "): v for n, v in leaves.items() if n.startswith("router")}
        x, made = leaves["x"], block.block(leaves, dtype, dtype)
        routing = own.route_masked(x, held, mask)
        y = with_base(run(x, routing, made), x, routing, made)
        grads = torch.autograd.grad(y, [*leaves.values()], block.upstream.to(dtype), True, True)
        found.append({"y": y.detach(), **dict(zip(leaves, grads, strict=True))})
        experts.append(torch.where(routing.filled, routing.experts, -1))
    assert torch.equal(*experts)
    counts = routing.filled[mask].sum(dim=1)
    assert (len(counts.unique()) > 1) is (name in OPTIONS)
    for key, value in found[0].items():
        truth = found[1][key]
        assert (value is None) is (truth is None), key
        if truth is not None:
            assert truth.abs().max() > 0, key
            assert (value - truth).norm() < 5e-5 * truth.norm(), key
