"""FLOPs of the experts' low-rank products in the Triton kernels, tile padding included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, GPU, fused, triton_order, triton_tiles

from mixlora_exp.kernels import Routing, route
from mixlora_exp.kernels.triton.tiles import HALF_TILES, HOPPER, Tiles


def rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def products(order, tiles: dict[str, Tiles], ranks: int, width: int, inner: int) -> int:
    """FLOPs of both passes of MixLoRA with experts on all three projections.

    A slot's tile is multiplied with every expert that it meets. Per tile and expert: 3 products of
    F columns forward (gate, up, A of down) and 5 in the backward pass over tokens (these, and B of
    gate and up); of D columns A of gate and up, and B of down, in each direction. Sums over an
    expert's rows: 6 products of F columns (gate, up, A of down and their gradients), and of D
    columns the gradients of A of gate and up and B of down.
    """
    experts, count = order.experts.cpu(), order.starts.numel() - 1
    own = order.starts.diff().tolist()

    def met(kernel: str) -> int:
        rows = tiles[kernel].rows
        parts = [part[part < count] for slots in experts.T for part in slots.split(rows)]
        return rows * sum(len(part.unique()) for part in parts)

    def wide(kernel: str, columns: int) -> int:
        return rounded(columns, tiles[kernel].inner)

    def listed(kernel: str) -> int:
        return sum(rounded(rows, tiles[kernel].rows) for rows in own)

    multiplied = (
        3 * met("forward") * wide("forward", inner)
        + 5 * met("tokens") * wide("tokens", inner)
        + 6 * listed("inner") * wide("inner", inner)
        + 3 * met("narrow") * wide("narrow", width)
        + 3 * met("wide") * wide("wide", width)
        + 3 * listed("matrices") * wide("matrices", width)
    )
    return 2 * ranks * multiplied


@pytest.mark.skipif(GPU, reason="counts what the interpreter multiplies")
@pytest.mark.parametrize("options", [{}, {"experts": 5, "top_k": 3, "empty": True}], ids=str)
def test_the_formula_counts_what_the_kernels_multiply(
    block_of, plain, monkeypatch, options
) -> None:
    block = block_of(replace(plain, tokens=37, hidden=40, **options), 0, torch.float32)
    counted = [0]
    real = np.matmul

    def matmul(a, b, *args, **kwargs):
        counted[0] += 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
        return real(a, b, *args, **kwargs)

    monkeypatch.setattr(np, "matmul", matmul)
    orders = []

    def noted(x: Tensor, routing: Routing, block) -> Tensor:
        arguments = routing.experts.to(DEVICE), routing.weights.detach(), block.num_experts
        orders.append(triton_order.order(*arguments))
        return fused(x, routing, block)

    block.run(noted, torch.float32)
    cpu = torch.device("cpu")
    tiles = {n: triton_tiles.tiles_of(n, 32, torch.float32, cpu) for n in HALF_TILES}
    assert counted[0] == products(orders[0], tiles, 16, 40, 20)


@pytest.mark.slow
def test_at_most_4_percent_of_the_frozen_products() -> None:
    """At LLaMA-2 7B's shape, as a router with random weights routes 2,048 tokens."""
    torch.manual_seed(0)
    width, inner, tokens, experts, rank = 4096, 11008, 2048, 8, 16
    routing = route(torch.randn(tokens, 64), torch.randn(experts, 64), 2)
    order = triton_order.order(routing.experts.to(DEVICE), routing.weights.to(DEVICE), experts)
    # The tables by columns: of one row or, over F, of both slots.
    frozen = 2 * 3 * 2 * tokens * width * inner
    tiles = {name: HALF_TILES[name][32] for name in HALF_TILES}
    assert products(order, tiles, rank, width, inner) <= 0.04 * frozen
    tiles |= {name: HOPPER[name, 32] for name, _ in HOPPER}
    assert products(order, tiles, rank, width, inner) <= 0.05 * frozen
