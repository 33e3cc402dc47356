"""Triton kernels of the backward pass of `ffn`: its words, flags and block sizes hold here.

One kernel sums over the slots of a token, one over the tokens; both compute gate, up and hidden
state again.
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
    spread_columns,
    store_columns,
)

__all__ = ["backward_inner_kernel", "backward_tokens_kernel"]


@triton.jit(do_not_specialize=["T", "steps"])
def backward_tokens_kernel(
    gate,
    up,
    p,
    q,
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
    dhidden,
    dgate,
    dup,
    dp,
    dweights,
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
    """What the backward pass sums over the slots of a token.

    dhidden: the gradient of the frozen down product's input, (T, F), or with PER_SLOT (T, K, F),
    then with the slot's weight in it. q (T, E R): what times A2 is the other part of that gradient,
    for any expert in its columns; with PER_SLOT for slot k, weighted, in those of its expert.
    Results: dgate, dup (T, F), summed over the slots; dp (splits, T, E R of gate, then of up)
    float32, each program's part of the gradient of p; dweights (splits, T, K) float32, its part
    of `sum_f h_k dh_k`, unless PER_SLOT. dgate may be dhidden unless PER_SLOT: a tile is read and
    written by one program.

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
        dp1 = tl.zeros((BT * SLOTS, PADDED), tl.float32)
    if LOW3:
        p3 = load_columns(p + LOW1 * COLUMNS, token, real, STRIDE, COLUMNS, PADDED)
        p3 = own(spread(p3, BT, SLOTS, PADDED), expert, R, PADDED)
        dp3 = tl.zeros((BT * SLOTS, PADDED), tl.float32)
    if LOW2:
        q2 = load_columns(q, token, real, COLUMNS, COLUMNS, PADDED)
        q2 = own(spread(q2, BT, SLOTS, PADDED), expert, R, PADDED)
    dweight = tl.zeros((BT * SLOTS,), tl.float32)
    for step in range(steps):
        inner = (tl.program_id(1) * steps + step) * BF + tl.arange(0, BF)
        within = inner < F
        inside = real[:, None] & within[None, :]
        offsets = token.to(tl.int64)[:, None] * F + inner[None, :]
        row_inside = filled[:, None] & within[None, :]
        g = tl.load(gate + offsets, mask=inside, other=0.0)
        g = spread(g, BT, SLOTS, BF).to(tl.float32)
        if LOW1:
            b1_tile = load_columns(b1, inner, within, COLUMNS, COLUMNS, PADDED)
            g += factor1 * dot(p1, tl.trans(b1_tile), None)
        if SCALE1:
            s1 = tl.load(scale1 + expert[:, None] * F + inner[None, :], mask=row_inside, other=0.0)
            g *= s1
        if BIAS1:
            g += tl.load(bias1 + inner, mask=within, other=0.0)[None, :]
        u = tl.load(up + offsets, mask=inside, other=0.0)
        u = spread(u, BT, SLOTS, BF).to(tl.float32)
        if LOW3:
            b3_tile = load_columns(b3, inner, within, COLUMNS, COLUMNS, PADDED)
            u += factor3 * dot(p3, tl.trans(b3_tile), None)
        if SCALE3:
            s3 = tl.load(scale3 + expert[:, None] * F + inner[None, :], mask=row_inside, other=0.0)
            u *= s3
        if BIAS3:
            u += tl.load(bias3 + inner, mask=within, other=0.0)[None, :]
        active, slope = activate(g, ACTIVATION)
        if PER_SLOT:
            dh = tl.load(dhidden + pair[:, None] * F + inner[None, :], mask=row_inside, other=0.0)
        else:
            dh = spread(tl.load(dhidden + offsets, mask=inside, other=0.0), BT, SLOTS, BF)
        dh = dh.to(tl.float32)
        if LOW2:
            tile = load_columns(a2, inner, within, COLUMNS, COLUMNS, PADDED)
            low = dot(q2, tl.trans(tile), None)
            if DROPPED:
                keep = tl.load(kept + offsets, mask=inside, other=0)
                low = tl.where(spread(keep, BT, SLOTS, BF) != 0, low, 0.0)
            dh += low
        if not PER_SLOT:
            dweight += tl.sum(active * u * dh, axis=1)
            dh *= weight[:, None]
        dg = dh * u * slope
        du = dh * active
        if SCALE1:
            dg *= s1
        if SCALE3:
            du *= s3
        tl.store(dgate + offsets, add_slots(dg, BT, SLOTS, BF).to(dtype), mask=inside)
        tl.store(dup + offsets, add_slots(du, BT, SLOTS, BF).to(dtype), mask=inside)
        if LOW1:
            dp1 = dot(dg.to(dtype), b1_tile, dp1)
        if LOW3:
            dp3 = dot(du.to(dtype), b3_tile, dp3)
    split = tl.program_id(1).to(tl.int64)
    if LOW1:
        dp1 = add_slots(own(factor1 * dp1, expert, R, PADDED), BT, SLOTS, PADDED)
        store_columns(dp + split * T * STRIDE, dp1, token, real, STRIDE, COLUMNS, PADDED)
    if LOW3:
        dp3 = add_slots(own(factor3 * dp3, expert, R, PADDED), BT, SLOTS, PADDED)
        part = dp + split * T * STRIDE + LOW1 * COLUMNS
        store_columns(part, dp3, token, real, STRIDE, COLUMNS, PADDED)
    if not PER_SLOT:
        dweight = tl.where(filled, dweight, 0.0)
        tl.store(dweights + split * T * K + pair, dweight, mask=valid)


@triton.jit(do_not_specialize=["T", "steps"])
def backward_inner_kernel(
    gate,
    up,
    p,
    q,
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
    dhidden,
    db1,
    db3,
    da2,
    dscale1,
    dscale3,
    T,
    F,
    steps,
    factor1,
    factor3,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
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
    """What the backward pass sums over the tokens: the gradients of the stacked matrices.

    p, q, dhidden: as `backward_tokens_kernel` takes them. Results, each program's part in float32:
    db1, db3, da2 (splits, F, E R); dscale1, dscale3 (splits, F, E), of DoRA's scale.

    Tiles stand as (BF, rows), so that gradients leave the activation in the layout in which the
    next product takes its left operand. EXPERTS is E padded.
    Grid: (F tiles, splits of T), `steps` token tiles a split.
    """
    inner = tl.program_id(0) * BF + tl.arange(0, BF)
    within = inner < F
    dtype = gate.dtype.element_ty
    STRIDE: tl.constexpr = (LOW1 + LOW3) * COLUMNS
    if LOW1:
        b1_tile = load_columns(b1, inner, within, COLUMNS, COLUMNS, PADDED)
        db1_tile = tl.zeros((BF, PADDED), tl.float32)
    if LOW3:
        b3_tile = load_columns(b3, inner, within, COLUMNS, COLUMNS, PADDED)
        db3_tile = tl.zeros((BF, PADDED), tl.float32)
    if LOW2:
        a2_tile = load_columns(a2, inner, within, COLUMNS, COLUMNS, PADDED)
        da2_tile = tl.zeros((BF, PADDED), tl.float32)
    if SCALE1:
        dscale1_tile = tl.zeros((BF, EXPERTS), tl.float32)
    if SCALE3:
        dscale3_tile = tl.zeros((BF, EXPERTS), tl.float32)
    for step in range(steps):
        first = (tl.program_id(1) * steps + step) * BT
        token = first + tl.arange(0, BT)
        real = token < T
        row = tl.arange(0, BT * SLOTS)
        row_token = first + row // SLOTS
        pair = row_token.to(tl.int64) * K + row % SLOTS
        valid = (row_token < T) & (row % SLOTS < K)
        weight = tl.load(weights + pair, mask=valid, other=0.0)
        filled = valid & (weight != 0.0)
        expert = tl.load(experts + pair, mask=filled, other=-1).to(tl.int32)
        inside = within[:, None] & real[None, :]
        offsets = token.to(tl.int64)[None, :] * F + inner[:, None]
        row_inside = within[:, None] & filled[None, :]
        raw1 = tl.load(gate + offsets, mask=inside, other=0.0)
        raw1 = spread_columns(raw1, BT, SLOTS, BF).to(tl.float32)
        if LOW1:
            p1 = load_columns(p, token, real, STRIDE, COLUMNS, PADDED)
            p1 = own(spread(p1, BT, SLOTS, PADDED), expert, R, PADDED)
            raw1 += factor1 * dot(b1_tile, tl.trans(p1), None)
        g = raw1
        if SCALE1:
            s1 = tl.load(scale1 + expert[None, :] * F + inner[:, None], mask=row_inside, other=0.0)
            g = raw1 * s1
        if BIAS1:
            g = g + tl.load(bias1 + inner, mask=within, other=0.0)[:, None]
        raw3 = tl.load(up + offsets, mask=inside, other=0.0)
        raw3 = spread_columns(raw3, BT, SLOTS, BF).to(tl.float32)
        if LOW3:
            p3 = load_columns(p + LOW1 * COLUMNS, token, real, STRIDE, COLUMNS, PADDED)
            p3 = own(spread(p3, BT, SLOTS, PADDED), expert, R, PADDED)
            raw3 += factor3 * dot(b3_tile, tl.trans(p3), None)
        u = raw3
        if SCALE3:
            s3 = tl.load(scale3 + expert[None, :] * F + inner[:, None], mask=row_inside, other=0.0)
            u = raw3 * s3
        if BIAS3:
            u = u + tl.load(bias3 + inner, mask=within, other=0.0)[:, None]
        active, slope = activate(g, ACTIVATION)
        if PER_SLOT:
            dh = tl.load(dhidden + pair[None, :] * F + inner[:, None], mask=row_inside, other=0.0)
        else:
            dh = tl.load(dhidden + offsets, mask=inside, other=0.0)
            dh = spread_columns(dh, BT, SLOTS, BF)
        dh = dh.to(tl.float32)
        if LOW2:
            q2 = load_columns(q, token, real, COLUMNS, COLUMNS, PADDED)
            q2 = own(spread(q2, BT, SLOTS, PADDED), expert, R, PADDED)
            low = dot(a2_tile, tl.trans(q2), None)
            h = active * u
            if not PER_SLOT:
                h *= weight[None, :]
            if DROPPED:
                keep = tl.load(kept + offsets, mask=inside, other=0)
                keep = spread_columns(keep, BT, SLOTS, BF) != 0
                low = tl.where(keep, low, 0.0)
                h = tl.where(keep, h, 0.0)
            dh += low
            da2_tile = dot(h.to(dtype), q2, da2_tile)
        if not PER_SLOT:
            dh *= weight[None, :]
        dg = dh * u * slope
        du = dh * active
        if SCALE1 or SCALE3:
            chosen = (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(dtype)
        if SCALE1:
            dscale1_tile = dot((dg * raw1).to(dtype), chosen, dscale1_tile)
            dg *= s1
        if SCALE3:
            dscale3_tile = dot((du * raw3).to(dtype), chosen, dscale3_tile)
            du *= s3
        if LOW1:
            db1_tile = dot(dg.to(dtype), p1, db1_tile)
        if LOW3:
            db3_tile = dot(du.to(dtype), p3, db3_tile)
    split = tl.program_id(1).to(tl.int64)
    part = split * F * COLUMNS
    if LOW1:
        store_columns(db1 + part, factor1 * db1_tile, inner, within, COLUMNS, COLUMNS, PADDED)
    if LOW3:
        store_columns(db3 + part, factor3 * db3_tile, inner, within, COLUMNS, COLUMNS, PADDED)
    if LOW2:
        store_columns(da2 + part, da2_tile, inner, within, COLUMNS, COLUMNS, PADDED)
    if SCALE1:
        store_columns(dscale1 + split * F * E, dscale1_tile, inner, within, E, E, EXPERTS)
    if SCALE3:
        store_columns(dscale3 + split * F * E, dscale3_tile, inner, within, E, E, EXPERTS)
