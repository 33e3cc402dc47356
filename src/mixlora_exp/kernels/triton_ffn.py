"""Triton kernels of the experts' part of the block, between the frozen products.

Per token t, slot k and its expert e, with weight w:

    g = scale1_e (G + f1 P1_k B1^T)    u = scale3_e (U + f3 P3_k B3^T)    h = act(g) u

`G`, `U` (T, F) are the frozen products, `P1`, `P3` (T, E R) `A x` of all experts, `P_k` the same
with the columns of other experts zero. Columns are picked with `where`, never by a product: what
stands in another expert's columns must not get in, not even as 0 * NaN.

The experts' low-rank matrices come stacked as (F, E R): B of gate and up, A of down transposed. In
the kernels E R is padded to a power of two. Sums are float32, operands of products in the dtype of
the tensors. What a program sums over its part of F (or T) it stores on its own, to be added
afterwards: no atomics, so the same input gives the same bits.

Flags: `LOW1`, `LOW3`, `LOW2`: gate, up, down have experts. `SCALE1`, `SCALE3`: they have DoRA's
scale (E, F). `PER_SLOT`: so has down, which then takes a hidden state per slot. `DROPPED`: `kept`
(T, F) is a dropout mask of the hidden state. Block sizes: `BT` tokens, `BF` of the F columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_inner_kernel", "backward_tokens_kernel", "forward_kernel"]

# Triton takes globals as constants only.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(0.7978845608028654)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(value, slope) of the activation."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(x * SQRT_HALF))
        value = x * below
        slope = below + x * INVERSE_SQRT_TAU * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # (1 + tanh z) / 2 is the logistic function of 2 z.
        s = tl.sigmoid(2.0 * TANH_SCALE * x * (1.0 + TANH_CUBIC * x * x))
        value = x * s
        slope = s + value * (1.0 - s) * 2.0 * TANH_SCALE * (1.0 + 3.0 * TANH_CUBIC * x * x)
    return value, slope


@triton.jit
def _mine(expert, R: tl.constexpr, PADDED: tl.constexpr):
    """(BT, PADDED): which columns belong to the token's expert. expert: (BT,), -1 for no token.

    A column of the padding belongs to expert E or above, so to nobody.
    """
    return expert[:, None] == (tl.arange(0, PADDED) // R)[None, :]


@triton.jit
def _load_columns(
    pointer, numbers, end, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr
):
    """(rows, PADDED): the rows `numbers` below `end` of a matrix of COLUMNS columns, 0 beyond."""
    columns = tl.arange(0, PADDED)
    offsets = numbers.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    inside = (numbers < end)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _store_columns(
    pointer, values, numbers, end, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr
):
    columns = tl.arange(0, PADDED)
    offsets = numbers.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    inside = (numbers < end)[:, None] & (columns < COLUMNS)[None, :]
    tl.store(pointer + offsets, values, mask=inside)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "span"])
def forward_kernel(
    gate,
    up,
    p,
    b1,
    b3,
    a2,
    scale1,
    scale3,
    experts,
    weights,
    kept,
    hidden,
    reduced,
    T,
    F,
    span,
    factor1,
    factor3,
    K: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    LOW2: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE3: tl.constexpr,
    PER_SLOT: tl.constexpr,
    DROPPED: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """The hidden state for the down projection, and its experts' `A h`.

    `hidden`: `sum_k w_k h_k` (T, F), or with PER_SLOT `h_k` (T, K, F). `reduced` (splits, T, E R)
    float32: each program's part of `A2 drop(h_k)` in the columns of slot k's expert, times w_k
    unless PER_SLOT. A token's experts are distinct, so its slots share a row.

    Grid: (token tiles, splits of F into spans).
    """
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    rows = tokens.to(tl.int64)
    dtype = gate.dtype.element_ty
    SIDES: tl.constexpr = LOW1 + LOW3
    if LOW1:
        p1 = _load_columns(p, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
    if LOW3:
        p3 = _load_columns(p + LOW1 * COLUMNS, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
    if LOW2:
        sums = tl.zeros((BT, PADDED), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, F), BF):
        inner = start + tl.arange(0, BF)
        inside = (tokens < T)[:, None] & (inner < F)[None, :]
        offsets = rows[:, None] * F + inner[None, :]
        frozen1 = tl.load(gate + offsets, mask=inside, other=0.0)
        frozen3 = tl.load(up + offsets, mask=inside, other=0.0)
        if LOW1:
            b1_tile = _load_columns(b1, inner, F, COLUMNS, COLUMNS, PADDED)
        if LOW3:
            b3_tile = _load_columns(b3, inner, F, COLUMNS, COLUMNS, PADDED)
        if LOW2:
            a2_tile = _load_columns(a2, inner, F, COLUMNS, COLUMNS, PADDED)
        if DROPPED:
            keep = tl.load(kept + offsets, mask=inside, other=0) != 0
        mixed = tl.zeros((BT, BF), tl.float32)
        for k in tl.static_range(K):
            expert = tl.load(experts + rows * K + k, mask=tokens < T, other=-1).to(tl.int32)
            mine = _mine(expert, R, PADDED)
            g = frozen1.to(tl.float32)
            if LOW1:
                g += factor1 * _dot(tl.where(mine, p1, 0.0), tl.trans(b1_tile))
            if SCALE1:
                g *= tl.load(scale1 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
            u = frozen3.to(tl.float32)
            if LOW3:
                u += factor3 * _dot(tl.where(mine, p3, 0.0), tl.trans(b3_tile))
            if SCALE3:
                u *= tl.load(scale3 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
            h = _activate(g, ACTIVATION)[0] * u
            if PER_SLOT:
                slot_offsets = (rows * K + k)[:, None] * F + inner[None, :]
                tl.store(hidden + slot_offsets, h.to(dtype), mask=inside)
            else:
                weight = tl.load(weights + rows * K + k, mask=tokens < T, other=0.0)
                mixed += weight[:, None] * h
            if LOW2:
                if DROPPED:
                    h = tl.where(keep, h, 0.0)
                sums += tl.where(mine, _dot(h.to(dtype), a2_tile), 0.0)
        if not PER_SLOT:
            tl.store(hidden + offsets, mixed.to(dtype), mask=inside)
    if LOW2:
        if not PER_SLOT:
            share = tl.zeros((BT, PADDED), tl.float32)
            for k in tl.static_range(K):
                expert = tl.load(experts + rows * K + k, mask=tokens < T, other=-1).to(tl.int32)
                weight = tl.load(weights + rows * K + k, mask=tokens < T, other=0.0)
                share = tl.where(_mine(expert, R, PADDED), weight[:, None], share)
            sums *= share
        part = reduced + tl.program_id(1).to(tl.int64) * T * COLUMNS
        _store_columns(part, sums, tokens, T, COLUMNS, COLUMNS, PADDED)


@triton.jit(do_not_specialize=["T", "span"])
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
    span,
    factor1,
    factor3,
    K: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    LOW2: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE3: tl.constexpr,
    PER_SLOT: tl.constexpr,
    DROPPED: tl.constexpr,
    SLOTS: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """What the backward pass sums over the slots of a token.

    dhidden: the gradient of the frozen down product's input, (T, F), or with PER_SLOT (T, K, F),
    then with the slot's weight in it; q (T, E R): what multiplies A2 to give its other part, dense
    over the experts, or with PER_SLOT the weighted one of slot k in the columns of its expert.
    Results: dgate, dup (T, F), summed over the slots; dp (splits, T, E R of gate and of up)
    float32, each program's part of the gradient of P; dweights (splits, T, K) float32, its part
    of `sum_f h_k dh_k`, unless PER_SLOT. dgate may be dhidden unless PER_SLOT: a tile is read and
    written by one program.

    Grid: (token tiles, splits of F into spans).
    """
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    rows = tokens.to(tl.int64)
    dtype = gate.dtype.element_ty
    SIDES: tl.constexpr = LOW1 + LOW3
    if LOW1:
        p1 = _load_columns(p, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
        dp1 = tl.zeros((BT, PADDED), tl.float32)
    if LOW3:
        p3 = _load_columns(p + LOW1 * COLUMNS, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
        dp3 = tl.zeros((BT, PADDED), tl.float32)
    if LOW2:
        q2 = _load_columns(q, tokens, T, COLUMNS, COLUMNS, PADDED)
    slots = tl.arange(0, SLOTS)
    dweight = tl.zeros((BT, SLOTS), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, F), BF):
        inner = start + tl.arange(0, BF)
        inside = (tokens < T)[:, None] & (inner < F)[None, :]
        offsets = rows[:, None] * F + inner[None, :]
        frozen1 = tl.load(gate + offsets, mask=inside, other=0.0)
        frozen3 = tl.load(up + offsets, mask=inside, other=0.0)
        if LOW1:
            b1_tile = _load_columns(b1, inner, F, COLUMNS, COLUMNS, PADDED)
        if LOW3:
            b3_tile = _load_columns(b3, inner, F, COLUMNS, COLUMNS, PADDED)
        if LOW2:
            a2_tile = _load_columns(a2, inner, F, COLUMNS, COLUMNS, PADDED)
        if DROPPED:
            keep = tl.load(kept + offsets, mask=inside, other=0) != 0
        if not PER_SLOT:
            shared = tl.load(dhidden + offsets, mask=inside, other=0.0)
        dgate_tile = tl.zeros((BT, BF), tl.float32)
        dup_tile = tl.zeros((BT, BF), tl.float32)
        for k in tl.static_range(K):
            expert = tl.load(experts + rows * K + k, mask=tokens < T, other=-1).to(tl.int32)
            mine = _mine(expert, R, PADDED)
            g = frozen1.to(tl.float32)
            if LOW1:
                g += factor1 * _dot(tl.where(mine, p1, 0.0), tl.trans(b1_tile))
            if SCALE1:
                s1 = tl.load(scale1 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
                g *= s1
            u = frozen3.to(tl.float32)
            if LOW3:
                u += factor3 * _dot(tl.where(mine, p3, 0.0), tl.trans(b3_tile))
            if SCALE3:
                s3 = tl.load(scale3 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
                u *= s3
            active, slope = _activate(g, ACTIVATION)
            if PER_SLOT:
                slot_offsets = (rows * K + k)[:, None] * F + inner[None, :]
                dh = tl.load(dhidden + slot_offsets, mask=inside, other=0.0).to(tl.float32)
            else:
                dh = shared.to(tl.float32)
            if LOW2:
                low = _dot(tl.where(mine, q2, 0.0), tl.trans(a2_tile))
                if DROPPED:
                    low = tl.where(keep, low, 0.0)
                dh += low
            if not PER_SLOT:
                share = tl.sum(active * u * dh, axis=1)
                dweight += tl.where(slots[None, :] == k, share[:, None], 0.0)
                weight = tl.load(weights + rows * K + k, mask=tokens < T, other=0.0)
                dh *= weight[:, None]
            dg = dh * u * slope
            du = dh * active
            if SCALE1:
                dg *= s1
            if SCALE3:
                du *= s3
            dgate_tile += dg
            dup_tile += du
            if LOW1:
                dp1 += tl.where(mine, _dot(dg.to(dtype), b1_tile), 0.0)
            if LOW3:
                dp3 += tl.where(mine, _dot(du.to(dtype), b3_tile), 0.0)
        tl.store(dgate + offsets, dgate_tile.to(dtype), mask=inside)
        tl.store(dup + offsets, dup_tile.to(dtype), mask=inside)
    split = tl.program_id(1).to(tl.int64)
    part = dp + split * T * (SIDES * COLUMNS)
    if LOW1:
        _store_columns(part, factor1 * dp1, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
    if LOW3:
        part += LOW1 * COLUMNS
        _store_columns(part, factor3 * dp3, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
    if not PER_SLOT:
        _store_columns(dweights + split * T * K, dweight, tokens, T, K, K, SLOTS)


@triton.jit(do_not_specialize=["T", "span"])
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
    span,
    factor1,
    factor3,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    LOW2: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE3: tl.constexpr,
    PER_SLOT: tl.constexpr,
    DROPPED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """What the backward pass sums over the tokens: the gradients of the stacked matrices.

    p, q, dhidden: as `backward_tokens_kernel` takes them. Results, each program's part in float32:
    db1, db3, da2 (splits, F, E R); dscale1, dscale3 (splits, F, E), of DoRA's scale.

    Tiles stand as (BF, BT), so that gradients leave the activation in the layout in which the next
    product takes its left operand. EXPERTS is E padded. Grid: (F tiles, splits of T into spans).
    """
    inner = tl.program_id(0) * BF + tl.arange(0, BF)
    dtype = gate.dtype.element_ty
    SIDES: tl.constexpr = LOW1 + LOW3
    if LOW1:
        b1_tile = _load_columns(b1, inner, F, COLUMNS, COLUMNS, PADDED)
        db1_tile = tl.zeros((BF, PADDED), tl.float32)
    if LOW3:
        b3_tile = _load_columns(b3, inner, F, COLUMNS, COLUMNS, PADDED)
        db3_tile = tl.zeros((BF, PADDED), tl.float32)
    if LOW2:
        a2_tile = _load_columns(a2, inner, F, COLUMNS, COLUMNS, PADDED)
        da2_tile = tl.zeros((BF, PADDED), tl.float32)
    if SCALE1:
        dscale1_tile = tl.zeros((BF, EXPERTS), tl.float32)
    if SCALE3:
        dscale3_tile = tl.zeros((BF, EXPERTS), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, T), BT):
        tokens = start + tl.arange(0, BT)
        rows = tokens.to(tl.int64)
        inside = (inner < F)[:, None] & (tokens < T)[None, :]
        offsets = rows[None, :] * F + inner[:, None]
        frozen1 = tl.load(gate + offsets, mask=inside, other=0.0)
        frozen3 = tl.load(up + offsets, mask=inside, other=0.0)
        if LOW1:
            p1 = _load_columns(p, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
        if LOW3:
            p3 = _load_columns(p + LOW1 * COLUMNS, tokens, T, SIDES * COLUMNS, COLUMNS, PADDED)
        if LOW2:
            q2 = _load_columns(q, tokens, T, COLUMNS, COLUMNS, PADDED)
        if DROPPED:
            keep = tl.load(kept + offsets, mask=inside, other=0) != 0
        if not PER_SLOT:
            shared = tl.load(dhidden + offsets, mask=inside, other=0.0)
        for k in tl.static_range(K):
            expert = tl.load(experts + rows * K + k, mask=tokens < T, other=-1).to(tl.int32)
            mine = _mine(expert, R, PADDED)
            raw1 = frozen1.to(tl.float32)
            if LOW1:
                p1_mine = tl.where(mine, p1, 0.0)
                raw1 += factor1 * _dot(b1_tile, tl.trans(p1_mine))
            g = raw1
            if SCALE1:
                s1 = tl.load(scale1 + expert[None, :] * F + inner[:, None], mask=inside, other=0.0)
                g = raw1 * s1
            raw3 = frozen3.to(tl.float32)
            if LOW3:
                p3_mine = tl.where(mine, p3, 0.0)
                raw3 += factor3 * _dot(b3_tile, tl.trans(p3_mine))
            u = raw3
            if SCALE3:
                s3 = tl.load(scale3 + expert[None, :] * F + inner[:, None], mask=inside, other=0.0)
                u = raw3 * s3
            active, slope = _activate(g, ACTIVATION)
            if PER_SLOT:
                slot_offsets = (rows * K + k)[None, :] * F + inner[:, None]
                dh = tl.load(dhidden + slot_offsets, mask=inside, other=0.0).to(tl.float32)
            else:
                dh = shared.to(tl.float32)
                weight = tl.load(weights + rows * K + k, mask=tokens < T, other=0.0)
            if LOW2:
                q2_mine = tl.where(mine, q2, 0.0)
                low = _dot(a2_tile, tl.trans(q2_mine))
                h = active * u
                if DROPPED:
                    low = tl.where(keep, low, 0.0)
                    h = tl.where(keep, h, 0.0)
                dh += low
                if not PER_SLOT:
                    h *= weight[None, :]
                da2_tile += _dot(h.to(dtype), q2_mine)
            if not PER_SLOT:
                dh *= weight[None, :]
            dg = dh * u * slope
            du = dh * active
            if SCALE1 or SCALE3:
                chosen = (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(dtype)
            if SCALE1:
                dscale1_tile += _dot((dg * raw1).to(dtype), chosen)
                dg *= s1
            if SCALE3:
                dscale3_tile += _dot((du * raw3).to(dtype), chosen)
                du *= s3
            if LOW1:
                db1_tile += _dot(dg.to(dtype), p1_mine)
            if LOW3:
                db3_tile += _dot(du.to(dtype), p3_mine)
    split = tl.program_id(1).to(tl.int64)
    part = split * F * COLUMNS
    if LOW1:
        _store_columns(db1 + part, factor1 * db1_tile, inner, F, COLUMNS, COLUMNS, PADDED)
    if LOW3:
        _store_columns(db3 + part, factor3 * db3_tile, inner, F, COLUMNS, COLUMNS, PADDED)
    if LOW2:
        _store_columns(da2 + part, da2_tile, inner, F, COLUMNS, COLUMNS, PADDED)
    if SCALE1:
        _store_columns(dscale1 + split * F * E, dscale1_tile, inner, F, E, E, EXPERTS)
    if SCALE3:
        _store_columns(dscale3 + split * F * E, dscale3_tile, inner, F, E, E, EXPERTS)
