"""Triton kernel of the experts' part of the block, between the frozen products.

A row is a token t and one of its K slots; e is the slot's expert, w its weight:

    g = scale1_e (G_t + f1 B1_e P1) + bias1    u = scale3_e (U_t + f3 B3_e P3) + bias3
    h = act(g) u

`G`, `U` (T, F) are the frozen products, by token; `P1`, `P3` (T K, R) are `A_e x` by row. Rows and
the sorted positions of tokens are those of `order`: a program handles neighbours in that order,
slot by slot, and multiplies with the matrices of the experts that the slot meets there, which are
few. Sums are float32, operands of products in the dtype of the tensors. What a program sums over
its part of F it stores on its own, to be added by the next kernel: no atomics, so the same input
gives the same bits. An empty slot has weight 0, and nothing is read for it.

In the kernels R is padded to RANKS. Flags: `LOW1`, `LOW3`, `LOW2`: gate, up, down have experts.
`SCALE1`, `SCALE3`: gate, up have DoRA's scale (E, F). `PER_SLOT`: so has down, which then takes a
hidden state per row. `BIAS1`, `BIAS3`: gate, up have a bias (F,). `DROPPED`: dropout takes elements
of the hidden state from the low-rank branch (`keys`, `place`, `threshold`: see `hashing`).
Block sizes: `BT` tokens, `BF` of the F columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixlora_exp.kernels.triton.hashing import kept, row_hash
from mixlora_exp.kernels.triton.parts import (
    activate,
    dot,
    load_low,
    load_matrix,
    next_met,
    store_low,
)

__all__ = ["forward_kernel", "low_rank_products", "met_by", "side"]


@triton.jit
def met_by(experts, position, real, k, K: tl.constexpr, E: tl.constexpr):
    """Return (expert, first, second): the experts of slot k by row, E for none, and the lowest two
    that are met there, E for none. Few tiles meet a second one, and a search for it in each step
    would cost more than the products.

    experts: (T, K) int32 by sorted position (see `order`).
    """
    expert = tl.load(experts + position * K + k, mask=real, other=E)
    first = tl.min(expert, axis=0)
    return expert, first, next_met(expert, first, E)


@triton.jit
def low_rank_products(
    columns1,
    columns3,
    columns2,
    b1,
    b3,
    a2,
    expert,
    first,
    second,
    inner,
    within,
    F,
    E: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    LOW2: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """Return products of a slot's rows of R columns with their experts' B1, B3 and transposed A2,
    each (BT, BF) float32, zeros for those there are not."""
    low1 = tl.zeros((BT, BF), tl.float32)
    low3 = tl.zeros((BT, BF), tl.float32)
    low2 = tl.zeros((BT, BF), tl.float32)
    e = first
    following = second
    while e < E:
        mine = (expert == e)[:, None]
        if LOW1:
            tile = load_matrix(b1, e, inner, within, F, R, RANKS, False)
            low1 = dot(tl.where(mine, columns1, 0.0), tl.trans(tile), low1)
        if LOW3:
            tile = load_matrix(b3, e, inner, within, F, R, RANKS, False)
            low3 = dot(tl.where(mine, columns3, 0.0), tl.trans(tile), low3)
        if LOW2:
            tile = load_matrix(a2, e, inner, within, F, R, RANKS, True)
            low2 = dot(tl.where(mine, columns2, 0.0), tl.trans(tile), low2)
        e = following
        if e < E:
            following = next_met(expert, e, E)
    return low1, low3, low2


@triton.jit
def side(
    frozen,
    low,
    scale,
    bias,
    factor,
    expert,
    filled,
    inner,
    within,
    F,
    LOW: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Return (g, s): gate or up of a slot's rows, and DoRA's scale of them or 1. frozen, low: (BT,
    BF)."""
    g = frozen
    s = 1.0
    if LOW:
        g += tl.cast(factor, tl.float32) * low
    if SCALE:
        inside = filled[:, None] & within[None, :]
        s = tl.load(scale + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
        s = s.to(tl.float32)
        g *= s
    if BIAS:
        g += tl.load(bias + inner, mask=within, other=0.0).to(tl.float32)[None, :]
    return g, s


@triton.jit(do_not_specialize=["T", "steps", "place", "threshold"])
def forward_kernel(
    gate,
    up,
    p1,
    p3,
    b1,
    b3,
    a2,
    scale1,
    scale3,
    bias1,
    bias3,
    keys,
    tokens,
    experts,
    weights,
    hidden,
    reduced,
    T,
    F,
    steps,
    place,
    threshold,
    factor1,
    factor3,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    LOW2: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE3: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS3: tl.constexpr,
    PER_SLOT: tl.constexpr,
    DROPPED: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """The hidden state for the down projection, and its experts' `A h`.

    `hidden`: `sum_k w_k h_k` (T, F) by token, or with PER_SLOT `h` (T K, F) by row, 0 in an empty
    slot. `reduced` (splits, T K, R) float32: each program's part of `A2_e drop(h)`, times w unless
    PER_SLOT. Grid: (token tiles, splits of F), `steps` F tiles a split.
    """
    position = tl.program_id(0) * BT + tl.arange(0, BT)
    real = position < T
    token = tl.load(tokens + position, mask=real, other=0)
    dtype = gate.dtype.element_ty
    if DROPPED:
        hash1, hash2 = row_hash(keys, token, real, place)
    sums = ()
    slots = ()
    for k in tl.static_range(K):
        sums = sums + (tl.zeros((BT, RANKS), tl.float32),)
        row = position * K + k
        expert, first, second = met_by(experts, position, real, k, K, E)
        filled = real & (expert < E)
        columns1 = load_low(p1, row, filled, R, RANKS) if LOW1 else 0.0
        columns3 = load_low(p3, row, filled, R, RANKS) if LOW3 else 0.0
        weight = tl.load(weights + row, mask=real, other=0.0)
        slots = slots + ((expert, first, second, columns1, columns3, weight),)
    for step in range(steps):
        inner = (tl.program_id(1) * steps + step) * BF + tl.arange(0, BF)
        within = inner < F
        inside = real[:, None] & within[None, :]
        offsets = token.to(tl.int64)[:, None] * F + inner[None, :]
        frozen1 = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
        frozen3 = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
        if DROPPED:
            keep = kept(hash1[:, None], hash2[:, None], inner[None, :], threshold)
        mixed = tl.zeros((BT, BF), tl.float32)
        parts = ()
        for k in tl.static_range(K):
            expert, first, second, columns1, columns3, weight = slots[k]
            filled = real & (expert < E)
            low1, low3, _low = low_rank_products(
                columns1, columns3, 0.0, b1, b3, a2, expert, first, second, inner, within, F, E, R,
                RANKS, LOW1, LOW3, False, BT, BF,
            )  # fmt: skip
            g, _s = side(
                frozen1, low1, scale1, bias1, factor1, expert, filled, inner, within, F, LOW1,
                SCALE1, BIAS1,
            )  # fmt: skip
            u, _s = side(
                frozen3, low3, scale3, bias3, factor3, expert, filled, inner, within, F, LOW3,
                SCALE3, BIAS3,
            )  # fmt: skip
            h = activate(g, ACTIVATION)[0] * u
            if PER_SLOT:
                h = tl.where(filled[:, None], h, 0.0)
                row = position * K + k
                to = hidden + row.to(tl.int64)[:, None] * F + inner[None, :]
                tl.store(to, h.to(dtype), mask=inside)
            else:
                mixed += weight[:, None] * h
            part = sums[k]
            if LOW2:
                if DROPPED:
                    h = tl.where(keep, h, 0.0)
                e = first
                following = second
                while e < E:
                    tile = load_matrix(a2, e, inner, within, F, R, RANKS, True)
                    mine = (expert == e)[:, None]
                    part += tl.where(mine, dot(h.to(dtype), tile, None), 0.0)
                    e = following
                    if e < E:
                        following = next_met(expert, e, E)
            parts = parts + (part,)
        sums = parts
        if not PER_SLOT:
            tl.store(hidden + offsets, mixed.to(dtype), mask=inside)
    if LOW2:
        reduced += tl.program_id(1).to(tl.int64) * T * K * R
        for k in tl.static_range(K):
            part = sums[k]
            row = position * K + k
            if not PER_SLOT:
                part *= slots[k][5][:, None]
            store_low(reduced, part, row, real, R, RANKS)
