"""Triton kernels of the experts' part of the block, between the frozen products.

A row is a token t and one of its K slots; e is the slot's expert, w its weight:

    g = scale1_e (G_t + f1 P1 B1^T)    u = scale3_e (U_t + f3 P3 B3^T)    h = act(g) u

`G`, `U` (T, F) are the frozen products. `P1`, `P3` (T, E R) are `A x` of all experts, of which a
row keeps its own expert's columns: by `where`, never by a product, for what stands in the others
must not get in, not even as 0 * NaN. Rows exist in registers only: a token's K rows lie side by
side in one program, which reads and writes (T, F) tensors once.

The experts' low-rank matrices come stacked as (F, E R): B of gate and up, A of down transposed. In
the kernels E R is padded to a power of two, and so is K. Sums are float32, operands of products in
the dtype of the tensors. What a program sums over its part of F (or T) it stores on its own, to be
added afterwards: no atomics, so the same input gives the same bits.

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
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _rows(first, T, K: tl.constexpr, SLOTS: tl.constexpr, BT: tl.constexpr):
    """(token, T K index, validity) of the BT SLOTS rows of the tokens from `first` on."""
    row = tl.arange(0, BT * SLOTS)
    token = first + row // SLOTS
    slot = row % SLOTS
    return token, token.to(tl.int64) * K + slot, (token < T) & (slot < K)


@triton.jit
def _load_columns(pointer, row, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(rows, PADDED): rows of a matrix of WIDTH columns, 0 where there is none."""
    column = tl.arange(0, PADDED)
    offsets = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    return tl.load(pointer + offsets, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_columns(
    pointer, values, row, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    column = tl.arange(0, PADDED)
    offsets = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    tl.store(pointer + offsets, values, mask=valid[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _own(values, expert, R: tl.constexpr, PADDED: tl.constexpr):
    """`values` (rows, PADDED) with the columns of other experts zero. expert: (rows,), -1 for none.

    A column of the padding belongs to expert E or above, so to nobody.
    """
    owner = tl.arange(0, PADDED) // R
    return tl.where(expert[:, None] == owner[None, :], values, 0.0)


@triton.jit
def _add_slots(values, BT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """(BT, WIDTH): the sum over each token's rows. values: (BT SLOTS, WIDTH)."""
    if SLOTS == 1:
        return values
    return tl.sum(tl.reshape(values, (BT, SLOTS, WIDTH)), axis=1)


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
    PER_SLOT: tl.constexpr,
    DROPPED: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """The hidden state for the down projection, and its experts' `A h`.

    `hidden`: `sum_k w_k h_k` (T, F), or with PER_SLOT `h_k` (T, K, F). `reduced` (splits, T, E R)
    float32: each program's part of `A2 drop(h_k)` in the columns of slot k's expert, times w_k
    unless PER_SLOT. A token's experts are distinct, so its slots share a row.

    Grid: (token tiles, splits of F), `steps` F tiles a split.
    """
    token, pair, valid = _rows(tl.program_id(0) * BT, T, K, SLOTS, BT)
    out_token = tl.program_id(0) * BT + tl.arange(0, BT)
    dtype = gate.dtype.element_ty
    SIDES: tl.constexpr = LOW1 + LOW3
    STRIDE: tl.constexpr = SIDES * COLUMNS
    expert = tl.load(experts + pair, mask=valid, other=-1).to(tl.int32)
    weight = tl.load(weights + pair, mask=valid, other=0.0)
    if LOW1:
        p1 = _own(_load_columns(p, token, valid, STRIDE, COLUMNS, PADDED), expert, R, PADDED)
    if LOW3:
        p3 = _load_columns(p + LOW1 * COLUMNS, token, valid, STRIDE, COLUMNS, PADDED)
        p3 = _own(p3, expert, R, PADDED)
    if LOW2:
        sums = tl.zeros((BT * SLOTS, PADDED), tl.float32)
    for step in range(steps):
        inner = (tl.program_id(1) * steps + step) * BF + tl.arange(0, BF)
        inside = valid[:, None] & (inner < F)[None, :]
        offsets = token.to(tl.int64)[:, None] * F + inner[None, :]
        g = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW1:
            tile = _load_columns(b1, inner, inner < F, COLUMNS, COLUMNS, PADDED)
            g += factor1 * _dot(p1, tl.trans(tile), None)
        if SCALE1:
            g *= tl.load(scale1 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
        u = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW3:
            tile = _load_columns(b3, inner, inner < F, COLUMNS, COLUMNS, PADDED)
            u += factor3 * _dot(p3, tl.trans(tile), None)
        if SCALE3:
            u *= tl.load(scale3 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
        h = _activate(g, ACTIVATION)[0] * u
        if PER_SLOT:
            tl.store(hidden + pair[:, None] * F + inner[None, :], h.to(dtype), mask=inside)
        else:
            mixed = _add_slots(weight[:, None] * h, BT, SLOTS, BF)
            out_offsets = out_token.to(tl.int64)[:, None] * F + inner[None, :]
            out_inside = (out_token < T)[:, None] & (inner < F)[None, :]
            tl.store(hidden + out_offsets, mixed.to(dtype), mask=out_inside)
        if LOW2:
            if DROPPED:
                h = tl.where(tl.load(kept + offsets, mask=inside, other=0) != 0, h, 0.0)
            tile = _load_columns(a2, inner, inner < F, COLUMNS, COLUMNS, PADDED)
            sums = _dot(h.to(dtype), tile, sums)
    if LOW2:
        if not PER_SLOT:
            sums *= weight[:, None]
        sums = _add_slots(_own(sums, expert, R, PADDED), BT, SLOTS, PADDED)
        part = reduced + tl.program_id(1).to(tl.int64) * T * COLUMNS
        _store_columns(part, sums, out_token, out_token < T, COLUMNS, COLUMNS, PADDED)


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
    PER_SLOT: tl.constexpr,
    DROPPED: tl.constexpr,
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

    Grid: (token tiles, splits of F), `steps` F tiles a split.
    """
    token, pair, valid = _rows(tl.program_id(0) * BT, T, K, SLOTS, BT)
    out_token = tl.program_id(0) * BT + tl.arange(0, BT)
    dtype = gate.dtype.element_ty
    SIDES: tl.constexpr = LOW1 + LOW3
    STRIDE: tl.constexpr = SIDES * COLUMNS
    expert = tl.load(experts + pair, mask=valid, other=-1).to(tl.int32)
    weight = tl.load(weights + pair, mask=valid, other=0.0)
    if LOW1:
        p1 = _own(_load_columns(p, token, valid, STRIDE, COLUMNS, PADDED), expert, R, PADDED)
        dp1 = tl.zeros((BT * SLOTS, PADDED), tl.float32)
    if LOW3:
        p3 = _load_columns(p + LOW1 * COLUMNS, token, valid, STRIDE, COLUMNS, PADDED)
        p3 = _own(p3, expert, R, PADDED)
        dp3 = tl.zeros((BT * SLOTS, PADDED), tl.float32)
    if LOW2:
        q2 = _own(_load_columns(q, token, valid, COLUMNS, COLUMNS, PADDED), expert, R, PADDED)
    dweight = tl.zeros((BT * SLOTS,), tl.float32)
    for step in range(steps):
        inner = (tl.program_id(1) * steps + step) * BF + tl.arange(0, BF)
        inside = valid[:, None] & (inner < F)[None, :]
        offsets = token.to(tl.int64)[:, None] * F + inner[None, :]
        g = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW1:
            b1_tile = _load_columns(b1, inner, inner < F, COLUMNS, COLUMNS, PADDED)
            g += factor1 * _dot(p1, tl.trans(b1_tile), None)
        if SCALE1:
            s1 = tl.load(scale1 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
            g *= s1
        u = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW3:
            b3_tile = _load_columns(b3, inner, inner < F, COLUMNS, COLUMNS, PADDED)
            u += factor3 * _dot(p3, tl.trans(b3_tile), None)
        if SCALE3:
            s3 = tl.load(scale3 + expert[:, None] * F + inner[None, :], mask=inside, other=0.0)
            u *= s3
        active, slope = _activate(g, ACTIVATION)
        if PER_SLOT:
            dh = tl.load(dhidden + pair[:, None] * F + inner[None, :], mask=inside, other=0.0)
        else:
            dh = tl.load(dhidden + offsets, mask=inside, other=0.0)
        dh = dh.to(tl.float32)
        if LOW2:
            tile = _load_columns(a2, inner, inner < F, COLUMNS, COLUMNS, PADDED)
            low = _dot(q2, tl.trans(tile), None)
            if DROPPED:
                low = tl.where(tl.load(kept + offsets, mask=inside, other=0) != 0, low, 0.0)
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
        out_offsets = out_token.to(tl.int64)[:, None] * F + inner[None, :]
        out_inside = (out_token < T)[:, None] & (inner < F)[None, :]
        tl.store(dgate + out_offsets, _add_slots(dg, BT, SLOTS, BF).to(dtype), mask=out_inside)
        tl.store(dup + out_offsets, _add_slots(du, BT, SLOTS, BF).to(dtype), mask=out_inside)
        if LOW1:
            dp1 = _dot(dg.to(dtype), b1_tile, dp1)
        if LOW3:
            dp3 = _dot(du.to(dtype), b3_tile, dp3)
    split = tl.program_id(1).to(tl.int64)
    part = dp + split * T * STRIDE
    if LOW1:
        dp1 = _add_slots(_own(factor1 * dp1, expert, R, PADDED), BT, SLOTS, PADDED)
        _store_columns(part, dp1, out_token, out_token < T, STRIDE, COLUMNS, PADDED)
    if LOW3:
        dp3 = _add_slots(_own(factor3 * dp3, expert, R, PADDED), BT, SLOTS, PADDED)
        part += LOW1 * COLUMNS
        _store_columns(part, dp3, out_token, out_token < T, STRIDE, COLUMNS, PADDED)
    if not PER_SLOT:
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
    PER_SLOT: tl.constexpr,
    DROPPED: tl.constexpr,
    EXPERTS: tl.constexpr,
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
    dtype = gate.dtype.element_ty
    SIDES: tl.constexpr = LOW1 + LOW3
    STRIDE: tl.constexpr = SIDES * COLUMNS
    if LOW1:
        b1_tile = _load_columns(b1, inner, inner < F, COLUMNS, COLUMNS, PADDED)
        db1_tile = tl.zeros((BF, PADDED), tl.float32)
    if LOW3:
        b3_tile = _load_columns(b3, inner, inner < F, COLUMNS, COLUMNS, PADDED)
        db3_tile = tl.zeros((BF, PADDED), tl.float32)
    if LOW2:
        a2_tile = _load_columns(a2, inner, inner < F, COLUMNS, COLUMNS, PADDED)
        da2_tile = tl.zeros((BF, PADDED), tl.float32)
    if SCALE1:
        dscale1_tile = tl.zeros((BF, EXPERTS), tl.float32)
    if SCALE3:
        dscale3_tile = tl.zeros((BF, EXPERTS), tl.float32)
    for step in range(steps):
        first = (tl.program_id(1) * steps + step) * BT
        token, pair, valid = _rows(first, T, K, SLOTS, BT)
        inside = (inner < F)[:, None] & valid[None, :]
        offsets = token.to(tl.int64)[None, :] * F + inner[:, None]
        expert = tl.load(experts + pair, mask=valid, other=-1).to(tl.int32)
        raw1 = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW1:
            p1 = _own(_load_columns(p, token, valid, STRIDE, COLUMNS, PADDED), expert, R, PADDED)
            raw1 += factor1 * _dot(b1_tile, tl.trans(p1), None)
        g = raw1
        if SCALE1:
            s1 = tl.load(scale1 + expert[None, :] * F + inner[:, None], mask=inside, other=0.0)
            g = raw1 * s1
        raw3 = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW3:
            p3 = _load_columns(p + LOW1 * COLUMNS, token, valid, STRIDE, COLUMNS, PADDED)
            p3 = _own(p3, expert, R, PADDED)
            raw3 += factor3 * _dot(b3_tile, tl.trans(p3), None)
        u = raw3
        if SCALE3:
            s3 = tl.load(scale3 + expert[None, :] * F + inner[:, None], mask=inside, other=0.0)
            u = raw3 * s3
        active, slope = _activate(g, ACTIVATION)
        if PER_SLOT:
            dh = tl.load(dhidden + pair[None, :] * F + inner[:, None], mask=inside, other=0.0)
        else:
            dh = tl.load(dhidden + offsets, mask=inside, other=0.0)
            weight = tl.load(weights + pair, mask=valid, other=0.0)
        dh = dh.to(tl.float32)
        if LOW2:
            q2 = _own(_load_columns(q, token, valid, COLUMNS, COLUMNS, PADDED), expert, R, PADDED)
            low = _dot(a2_tile, tl.trans(q2), None)
            h = active * u
            if DROPPED:
                keep = tl.load(kept + offsets, mask=inside, other=0) != 0
                low = tl.where(keep, low, 0.0)
                h = tl.where(keep, h, 0.0)
            dh += low
            if not PER_SLOT:
                h *= weight[None, :]
            da2_tile = _dot(h.to(dtype), q2, da2_tile)
        if not PER_SLOT:
            dh *= weight[None, :]
        dg = dh * u * slope
        du = dh * active
        if SCALE1 or SCALE3:
            chosen = (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(dtype)
        if SCALE1:
            dscale1_tile = _dot((dg * raw1).to(dtype), chosen, dscale1_tile)
            dg *= s1
        if SCALE3:
            dscale3_tile = _dot((du * raw3).to(dtype), chosen, dscale3_tile)
            du *= s3
        if LOW1:
            db1_tile = _dot(dg.to(dtype), p1, db1_tile)
        if LOW3:
            db3_tile = _dot(du.to(dtype), p3, db3_tile)
    split = tl.program_id(1).to(tl.int64)
    part = split * F * COLUMNS
    if LOW1:
        _store_columns(db1 + part, factor1 * db1_tile, inner, inner < F, COLUMNS, COLUMNS, PADDED)
    if LOW3:
        _store_columns(db3 + part, factor3 * db3_tile, inner, inner < F, COLUMNS, COLUMNS, PADDED)
    if LOW2:
        _store_columns(da2 + part, da2_tile, inner, inner < F, COLUMNS, COLUMNS, PADDED)
    if SCALE1:
        _store_columns(dscale1 + split * F * E, dscale1_tile, inner, inner < F, E, E, EXPERTS)
    if SCALE3:
        _store_columns(dscale3 + split * F * E, dscale3_tile, inner, inner < F, E, E, EXPERTS)
