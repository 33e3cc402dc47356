"""Triton kernel of the experts' part of the block, between the frozen products.

A row is a token t and one of its K slots; e is the slot's expert, w its weight:

    g = scale1_e (G_t + f1 P1 B1^T) + bias1    u = scale3_e (U_t + f3 P3 B3^T) + bias3
    h = act(g) u

`G`, `U` (T, F) are the frozen products; `P1`, `P3` (T, E R) are `A x` of all experts, of which a
row keeps its own expert's columns. A slot of weight 0 is empty: expert -1, no columns. Rows exist
in registers only: a token's rows lie side by side in one program, which reads and writes (T, F)
tensors once.

The experts' low-rank matrices come stacked as (F, E R): B of gate and up, A of down transposed. In
the kernels E R is padded to a power of two, K to SLOTS. Sums are float32, operands of products in
the dtype of the tensors. What a program sums over its part of F (or T) it stores on its own, to be
added afterwards: no atomics, so the same input gives the same bits.

Flags: `LOW1`, `LOW3`, `LOW2`: gate, up, down have experts. `SCALE1`, `SCALE3`: gate, up have
DoRA's scale (E, F). `PER_SLOT`: so has down, which then takes a hidden state per slot. `BIAS1`,
`BIAS3`: gate, up have a bias (F,). `DROPPED`: `kept` (T, F) is a dropout mask of the hidden state.
Block sizes: `BT` tokens, `BF` of the F columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixlora_exp.kernels.triton.parts import (
    activate,
    add_slots,
    dot,
    load_columns,
    own,
    spread,
    store_columns,
)

__all__ = ["forward_kernel"]


@triton.jit(do_not_specialize=["T", "steps"])
def forward_kernel(
    gate,
    up,
    p,
    b1,
    b3,
    a2,
    scale1,
    scale3,
    bias1,
    bias3,
    experts,
    weights,
    kept,
    hidden,
    reduced,
    T,
    F,
    steps,
    factor1,
    factor3,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
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

    p: (T, E R of gate, then of up). `hidden`: `sum_k w_k h_k` (T, F), or with PER_SLOT `h_k`
    (T, K, F). `reduced` (splits, T, E R) float32: each program's part of `A2 drop(h_k)` in the
    columns of slot k's expert, times w_k unless PER_SLOT. A token's experts are distinct, so its
    slots fit side by side.

    Grid: (token tiles, splits of F), `steps` F tiles a split.
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = token < T
    row = tl.arange(0, BT * SLOTS)
    row_token = tl.program_id(0) * BT + row // SLOTS
    pair = row_token.to(tl.int64) * K + row % SLOTS
    valid = (row_token < T) & (row % SLOTS < K)
    weight = tl.load(weights + pair, mask=valid, other=0.0)
    filled = valid & (weight != 0.0)
    expert = tl.load(experts + pair, mask=filled, other=-1).to(tl.int32)
    dtype = gate.dtype.element_ty
    STRIDE: tl.constexpr = (LOW1 + LOW3) * COLUMNS
    if LOW1:
        p1 = load_columns(p, token, real, STRIDE, COLUMNS, PADDED)
        p1 = own(spread(p1, BT, SLOTS, PADDED), expert, R, PADDED)
    if LOW3:
        p3 = load_columns(p + LOW1 * COLUMNS, token, real, STRIDE, COLUMNS, PADDED)
        p3 = own(spread(p3, BT, SLOTS, PADDED), expert, R, PADDED)
    if LOW2:
        sums = tl.zeros((BT * SLOTS, PADDED), tl.float32)
    for step in range(steps):
        inner = (tl.program_id(1) * steps + step) * BF + tl.arange(0, BF)
        within = inner < F
        inside = real[:, None] & within[None, :]
        offsets = token.to(tl.int64)[:, None] * F + inner[None, :]
        row_inside = filled[:, None] & within[None, :]
        g = tl.load(gate + offsets, mask=inside, other=0.0)
        g = spread(g, BT, SLOTS, BF).to(tl.float32)
        if LOW1:
            tile = load_columns(b1, inner, within, COLUMNS, COLUMNS, PADDED)
            g += factor1 * dot(p1, tl.trans(tile), None)
        if SCALE1:
            s1 = tl.load(scale1 + expert[:, None] * F + inner[None, :], mask=row_inside, other=0.0)
            g *= s1
        if BIAS1:
            g += tl.load(bias1 + inner, mask=within, other=0.0)[None, :]
        u = tl.load(up + offsets, mask=inside, other=0.0)
        u = spread(u, BT, SLOTS, BF).to(tl.float32)
        if LOW3:
            tile = load_columns(b3, inner, within, COLUMNS, COLUMNS, PADDED)
            u += factor3 * dot(p3, tl.trans(tile), None)
        if SCALE3:
            s3 = tl.load(scale3 + expert[:, None] * F + inner[None, :], mask=row_inside, other=0.0)
            u *= s3
        if BIAS3:
            u += tl.load(bias3 + inner, mask=within, other=0.0)[None, :]
        h = activate(g, ACTIVATION)[0] * u
        if PER_SLOT:
            h = tl.where(filled[:, None], h, 0.0)
            own_row = valid[:, None] & within[None, :]
            tl.store(hidden + pair[:, None] * F + inner[None, :], h.to(dtype), mask=own_row)
        else:
            mixed = add_slots(weight[:, None] * h, BT, SLOTS, BF)
            tl.store(hidden + offsets, mixed.to(dtype), mask=inside)
        if LOW2:
            if DROPPED:
                keep = tl.load(kept + offsets, mask=inside, other=0)
                h = tl.where(spread(keep, BT, SLOTS, BF) != 0, h, 0.0)
            tile = load_columns(a2, inner, within, COLUMNS, COLUMNS, PADDED)
            sums = dot(h.to(dtype), tile, sums)
    if LOW2:
        if not PER_SLOT:
            sums *= weight[:, None]
        sums = add_slots(own(sums, expert, R, PADDED), BT, SLOTS, PADDED)
        part = reduced + tl.program_id(1).to(tl.int64) * T * COLUMNS
        store_columns(part, sums, token, real, COLUMNS, COLUMNS, PADDED)
