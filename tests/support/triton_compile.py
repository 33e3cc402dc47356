"""Compiles the kernels of the block and the router for given cards, as their operators launch them.

`python triton_compile.py 8.0 9.0` takes the usual block in bf16, with `all` every table of block
sizes. Prints a line per launch: `fits` or `refused`, its spilled registers and shared memory.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton_cards import SHARED, SPILLED, compiled

from mixlora_exp.kernels.triton import columns, hidden, order, router, scaled, tiles

MOST_SLOTS = 3
"""Of a token, whose sums the registers hold."""
LARGE = {"forward_kernel": 49, "backward_tokens_kernel": 15}
"""Registers that the block sizes spill which are faster all the same (`tiles.HOPPER`)."""


def most_spilled(kernel: str, card: str, title: str, named: dict[str, Any]) -> int:
    """Registers that a kernel may lay aside."""
    if named.get("K", 1) > MOST_SLOTS:
        return 320
    if kernel == "backward_tokens_kernel" and (named["K"], named["R"]) == (2, 128):
        return 12
    usual = card == "9.0" and title == "the usual block"
    return max(SPILLED, LARGE.get(kernel, 0)) if usual else SPILLED


class Compile:
    """Stands in for `operators.start`: compiles instead of launching, each launch once."""

    def __init__(self, card: str, title: str) -> None:
        self.card, self.title = card, title
        self.seen: set[str] = set()

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        named |= dict(zip(kernel.arg_names, arguments, strict=False))
        shapes = {n: v.dtype if isinstance(v, Tensor) else v for n, v in named.items()}
        key = f"{kernel.fn.__name__} {shapes} {options}"
        if key in self.seen:
            return
        self.seen.add(key)
        try:
            shared, spilled = compiled(kernel, self.card, named, options)
            most = most_spilled(kernel.fn.__name__, self.card, self.title, named)
            fits = shared <= SHARED[self.card] and spilled <= most
            told = f"{spilled} registers spilled, {shared} bytes"
        except Exception as error:  # what the compiler raises has many types
            fits, told = False, f"{error!r:.500}"
        verdict = "fits" if fits else "refused"
        print(f"{verdict}: {kernel.fn.__name__}, {self.card}, {self.title}, {told}")  # noqa: T201


def compile_block(
    dtype: torch.dtype,
    rank: int,
    top_k: int = 2,
    *,
    dora: bool = False,
    masked: bool = True,
    biased: bool = False,
) -> None:
    """Every launch of one forward and backward pass of 256 tokens, D = 512, F = 1024, E = 8."""
    tokens, width, inner, experts, full = 256, 512, 1024, 8, torch.float32

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    chosen = make(tokens, top_k, dtype=torch.int64)
    way = order.order(chosen, make(tokens, top_k, dtype=full), experts)
    keys = make(tokens, dtype=torch.int64) if masked else None
    x, a, b = make(tokens, width), make(experts, rank, width), make(experts, inner, rank)
    a2, b2, scale2 = make(experts, rank, inner), make(experts, width, rank), make(experts, width)
    scale = make(experts, inner) if dora else None
    norm = make(experts, inner, dtype=full) if dora else None
    bias = make(inner) if biased else None
    p1, p3 = columns.to_columns(x, a, a, keys, way.tokens, way.experts, 0, 1, 1.0, True)
    wide = make(tokens, inner)
    held = hidden.Operands(
        wide, wide, p1, p3, b, b, a2, scale, scale, bias, bias, keys, way.tokens, way.weights
    )
    settings = (0, 1, 2.0, 2.0, "silu" if top_k > 1 else "gelu", dora)
    state, parts = hidden.hidden_forward(held, way.experts, *settings)
    at = way.tokens, way.weights, way.rows, way.starts
    if dora:
        raw = make(tokens * top_k, width)
        where = way.tokens, way.experts, way.weights
        y, raw, low = scaled.scaled_from_columns(raw, parts, b2, scale2, *where, 2.0)
        q, raw, _ = scaled.scaled_to_columns(y, b2, scale2, raw, *where, way.slots, 2.0)
        over = make(experts, width, dtype=full)
        scaled.scaled_matrix_gradients(raw, low, y, raw, over, *at, full, 2.0)
    else:
        where = way.tokens, way.experts, way.slots
        y, low, _, _ = columns.from_columns(
            x, None, parts, None, b2, None, None, *where, None, 0, 1, 2.0, False
        )
        q, _ = columns.to_columns(y, b2, None, None, *where[:2], 0, 1, 2.0, False)
        columns.matrix_gradients(y, low, None, None, *at, full, 0, 1, 2.0, False)
    hidden.hidden_backward_inner(held, *at[2:], q, state, norm, norm, full, *settings)
    _, dp1, dp3, dweights = hidden.hidden_backward_tokens(
        held, way.experts, q, state, wide, *settings
    )
    where = way.tokens, way.experts, way.slots
    _, low1, low3, _ = columns.from_columns(
        x, x, dp1, dp3, a, a, keys, *where, None if dora else dweights, 0, 1, 1.0, True
    )
    columns.matrix_gradients(x, low1, low3, keys, *at, full, 0, 1, 1.0, True)


def compile_router(dtype: torch.dtype, experts: int, top_k: int) -> None:
    """Every launch of the router, with a gradient for each of its outputs."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, mask = make(256, 512, dtype=dtype), make(experts, 512), make(256, dtype=torch.bool)
    logits, shares, chosen, weights, report = router._route(x, weight, mask, top_k)
    gradients = logits, shares, weights, report, x
    router._route_backward(x, weight, mask, shares, chosen, *gradients)


def main(cards: list[str], everything: bool) -> None:
    half = torch.bfloat16
    cases: list[tuple[str, dict[str, Any]]] = [
        ("the usual block", {"dtype": half, "rank": 16}),
        ("bias", {"dtype": half, "rank": 16, "biased": True}),
        ("DoRA, bias", {"dtype": half, "rank": 16, "dora": True, "biased": True}),
    ]
    if everything:
        half_sizes = ((16, 1), (32, 2), (16, 8), (64, 2), (128, 1), (128, 2), (256, 1))
        full_sizes = ((16, 2), (64, 1), (16, 8))
        cases += [
            (f"{dtype}, rank {rank}, K = {top_k}", {"dtype": dtype, "rank": rank, "top_k": top_k})
            for dtype, sizes in ((half, half_sizes), (torch.float32, full_sizes))
            for rank, top_k in sizes
        ]
        cases += [
            ("float16, no mask", {"dtype": torch.float16, "rank": 16, "masked": False}),
            ("DoRA, rank 64", {"dtype": half, "rank": 64, "dora": True}),
        ]
    for card in cards:
        for title, options in cases:
            instead = Compile(card, title)
            # Block sizes as on a machine that has the card.
            there = SimpleNamespace(major=int(card[0]), multi_processor_count=132)
            tiles._card = lambda device, there=there: there
            for module in (columns, hidden, order, router, scaled):
                module.start = instead
            compile_block(**options)
            compile_router(options["dtype"], 8, options.get("top_k", 2))


if __name__ == "__main__":
    main([card for card in sys.argv[1:] if card != "all"], "all" in sys.argv)
