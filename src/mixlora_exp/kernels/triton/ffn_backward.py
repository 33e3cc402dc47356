"""Triton kernels of the gradients of the feed-forward block; arguments, flags and block sizes are
those of the forward pass, `ffn`.

One kernel sums over the slots of a token, one over the rows of an expert; both compute gate, up and
hidden state again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixlora_exp.kernels.triton.ffn import low_rank_products, met_by, side
from mixlora_exp.kernels.triton.hashing import kept, row_hash
from mixlora_exp.kernels.triton.parts import (
    activate,
    dot,
    load_low,
    load_matrix,
    next_met,
    store_low,
)

__all__ = ["backward_inner_kernel", "backward_tokens_kernel"]


@triton.jit
def _low_rank_gradients(
    total1,
    total3,
    dg,
    du,
    b1,
    b3,
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
):
    """Return the totals and the gradients of a slot's `A_e x` through the tile's part of B1 and
    B3."""
    e = first
    following = second
    while e < E:
        mine = (expert == e)[:, None]
        if LOW1:
            tile = load_matrix(b1, e, inner, within, F, R, RANKS, False)
            total1 += tl.where(mine, dot(dg.to(tile.dtype), tile, None), 0.0)
        if LOW3:
            tile = load_matrix(b3, e, inner, within, F, R, RANKS, False)
            total3 += tl.where(mine, dot(du.to(tile.dtype), tile, None), 0.0)
        e = following
        if e < E:
            following = next_met(expert, e, E)
    return total1, total3


@triton.jit(do_not_specialize=["T", "steps", "place", "threshold"])
def backward_tokens_kernel(
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
    q,
    dhidden,
    dgate,
    dup,
    dp1,
    dp3,
    dweights,
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
    """Backward sums over the slots of each token: gradients of the frozen products and of A x.

    dhidden: the gradient of the frozen down product's input, (T, F) by token, or with PER_SLOT
    (T K, F) by row, then with the row's weight in it. q (T K, R): what times A2_e is the other part
    of that gradient, with PER_SLOT weighted too. Results: dgate, dup (T, F), summed over the slots;
    dp1, dp3 (splits, T K, R) float32, each program's part of the gradients of p1, p3; dweights
    (splits, T K) float32, its part of `sum_f h dh`, unless PER_SLOT.

    Grid: (token tiles, splits of F), `steps` F tiles a split.
    """
    position = tl.program_id(0) * BT + tl.arange(0, BT)
    real = position < T
    token = tl.load(tokens + position, mask=real, other=0)
    dtype = gate.dtype.element_ty
    if DROPPED:
        hash1, hash2 = row_hash(keys, token, real, place)
    sums1 = ()
    sums3 = ()
    sums_w = ()
    slots = ()
    for k in tl.static_range(K):
        sums1 = sums1 + (tl.zeros((BT, RANKS), tl.float32),)
        sums3 = sums3 + (tl.zeros((BT, RANKS), tl.float32),)
        sums_w = sums_w + (tl.zeros((BT,), tl.float32),)
        row = position * K + k
        expert, first, second = met_by(experts, position, real, k, K, E)
        filled = real & (expert < E)
        columns1 = load_low(p1, row, filled, R, RANKS) if LOW1 else 0.0
        columns3 = load_low(p3, row, filled, R, RANKS) if LOW3 else 0.0
        columns2 = load_low(q, row, filled, R, RANKS) if LOW2 else 0.0
        weight = tl.load(weights + row, mask=real, other=0.0)
        slots = slots + ((expert, first, second, columns1, columns3, columns2, weight),)
    for step in range(steps):
        inner = (tl.program_id(1) * steps + step) * BF + tl.arange(0, BF)
        within = inner < F
        inside = real[:, None] & within[None, :]
        offsets = token.to(tl.int64)[:, None] * F + inner[None, :]
        frozen1 = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
        frozen3 = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
        if DROPPED:
            keep = kept(hash1[:, None], hash2[:, None], inner[None, :], threshold)
        if not PER_SLOT:
            shared = tl.load(dhidden + offsets, mask=inside, other=0.0).to(tl.float32)
        sum_g = tl.zeros((BT, BF), tl.float32)
        sum_u = tl.zeros((BT, BF), tl.float32)
        parts1 = ()
        parts3 = ()
        parts_w = ()
        for k in tl.static_range(K):
            expert, first, second, columns1, columns3, columns2, weight = slots[k]
            filled = real & (expert < E)
            low1, low3, low2 = low_rank_products(
                columns1, columns3, columns2, b1, b3, a2, expert, first, second, inner, within, F,
                E, R, RANKS, LOW1, LOW3, LOW2, BT, BF,
            )  # fmt: skip
            g, s1 = side(
                frozen1, low1, scale1, bias1, factor1, expert, filled, inner, within, F, LOW1,
                SCALE1, BIAS1,
            )  # fmt: skip
            u, s3 = side(
                frozen3, low3, scale3, bias3, factor3, expert, filled, inner, within, F, LOW3,
                SCALE3, BIAS3,
            )  # fmt: skip
            active, slope = activate(g, ACTIVATION)
            if PER_SLOT:
                row = position * K + k
                place_of = dhidden + row.to(tl.int64)[:, None] * F + inner[None, :]
                own = filled[:, None] & within[None, :]
                dh = tl.load(place_of, mask=own, other=0.0).to(tl.float32)
            else:
                dh = shared
            if LOW2:
                if DROPPED:
                    low2 = tl.where(keep, low2, 0.0)
                dh += low2
            part_w = sums_w[k]
            if not PER_SLOT:
                part_w += tl.sum(active * u * dh, axis=1)
                dh *= weight[:, None]
            parts_w = parts_w + (part_w,)
            dg = dh * u * slope * s1
            du = dh * active * s3
            sum_g += dg
            sum_u += du
            part1, part3 = _low_rank_gradients(
                sums1[k], sums3[k], dg, du, b1, b3, expert, first, second, inner, within, F, E, R,
                RANKS, LOW1, LOW3,
            )  # fmt: skip
            parts1 = parts1 + (part1,)
            parts3 = parts3 + (part3,)
        sums1, sums3, sums_w = parts1, parts3, parts_w
        tl.store(dgate + offsets, sum_g.to(dtype), mask=inside)
        tl.store(dup + offsets, sum_u.to(dtype), mask=inside)
    split = tl.program_id(1).to(tl.int64) * T * K
    for k in tl.static_range(K):
        row = position * K + k
        if LOW1:
            store_low(dp1 + split * R, tl.cast(factor1, tl.float32) * sums1[k], row, real, R, RANKS)
        if LOW3:
            store_low(dp3 + split * R, tl.cast(factor3, tl.float32) * sums3[k], row, real, R, RANKS)
        if not PER_SLOT:
            expert = slots[k][0]
            tl.store(dweights + split + row, tl.where(expert < E, sums_w[k], 0.0), mask=real)


@triton.jit(do_not_specialize=["T", "place", "threshold"])
def backward_inner_kernel(
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
    weights,
    rows,
    starts,
    q,
    dhidden,
    norm1,
    norm3,
    db1,
    db3,
    da2,
    dmagnitude1,
    dmagnitude3,
    T,
    F,
    place,
    threshold,
    factor1,
    factor3,
    K: tl.constexpr,
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
    """Backward sums over the rows of each expert: the gradients of its parameters.

    q, dhidden: as `backward_tokens_kernel` takes them. norm1, norm3 (E, F): what the magnitudes
    stand over in DoRA's scale. Results, in the dtype and layout of the parameters: db1, db3
    (E, F, R); da2 (E, R, F); dmagnitude1, dmagnitude3 (E, F).

    Tiles stand as (BF, rows), so that gradients leave the activation in the layout in which the
    next product takes its left operand. Grid: (F tiles, E).
    """
    inner = tl.program_id(0) * BF + tl.arange(0, BF)
    within = inner < F
    expert = tl.program_id(1)
    dtype = gate.dtype.element_ty
    if LOW1:
        b1_tile = load_matrix(b1, expert, inner, within, F, R, RANKS, False)
    if LOW3:
        b3_tile = load_matrix(b3, expert, inner, within, F, R, RANKS, False)
    if LOW2:
        a2_tile = load_matrix(a2, expert, inner, within, F, R, RANKS, True)
    s1 = 1.0
    s3 = 1.0
    if SCALE1:
        s1 = tl.load(scale1 + expert * F + inner, mask=within, other=0.0).to(tl.float32)[:, None]
    if SCALE3:
        s3 = tl.load(scale3 + expert * F + inner, mask=within, other=0.0).to(tl.float32)[:, None]
    db1_tile = tl.zeros((BF, RANKS), tl.float32)
    db3_tile = tl.zeros((BF, RANKS), tl.float32)
    da2_tile = tl.zeros((BF, RANKS), tl.float32)
    dscale1 = tl.zeros((BF,), tl.float32)
    dscale3 = tl.zeros((BF,), tl.float32)
    end = tl.load(starts + expert + 1)
    for first in range(tl.load(starts + expert), end, BT):
        index = first + tl.arange(0, BT)
        valid = index < end
        row = tl.load(rows + index, mask=valid, other=0)
        token = tl.load(tokens + row // K, mask=valid, other=0)
        weight = tl.load(weights + row, mask=valid, other=0.0)
        inside = within[:, None] & valid[None, :]
        offsets = token.to(tl.int64)[None, :] * F + inner[:, None]
        raw1 = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW1:
            columns1 = load_low(p1, row, valid, R, RANKS)
            raw1 += tl.cast(factor1, tl.float32) * dot(b1_tile, tl.trans(columns1), None)
        g = raw1 * s1
        if BIAS1:
            g += tl.load(bias1 + inner, mask=within, other=0.0).to(tl.float32)[:, None]
        raw3 = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW3:
            columns3 = load_low(p3, row, valid, R, RANKS)
            raw3 += tl.cast(factor3, tl.float32) * dot(b3_tile, tl.trans(columns3), None)
        u = raw3 * s3
        if BIAS3:
            u += tl.load(bias3 + inner, mask=within, other=0.0).to(tl.float32)[:, None]
        active, slope = activate(g, ACTIVATION)
        if PER_SLOT:
            own = dhidden + row.to(tl.int64)[None, :] * F + inner[:, None]
            dh = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        else:
            dh = tl.load(dhidden + offsets, mask=inside, other=0.0).to(tl.float32)
        if LOW2:
            columns2 = load_low(q, row, valid, R, RANKS)
            low = dot(a2_tile, tl.trans(columns2), None)
            h = active * u
            if not PER_SLOT:
                h *= weight[None, :]
            if DROPPED:
                hash1, hash2 = row_hash(keys, token, valid, place)
                keep = kept(hash1[None, :], hash2[None, :], inner[:, None], threshold)
                low = tl.where(keep, low, 0.0)
                h = tl.where(keep, h, 0.0)
            dh += low
            da2_tile = dot(h.to(dtype), columns2, da2_tile)
        if not PER_SLOT:
            dh *= weight[None, :]
        dg = dh * u * slope
        du = dh * active
        if SCALE1:
            dscale1 += tl.sum(dg * raw1, axis=1)
        if SCALE3:
            dscale3 += tl.sum(du * raw3, axis=1)
        if LOW1:
            db1_tile = dot((dg * s1).to(dtype), columns1, db1_tile)
        if LOW3:
            db3_tile = dot((du * s3).to(dtype), columns3, db3_tile)
    rank = tl.arange(0, RANKS)
    inside = within[:, None] & (rank < R)[None, :]
    along = expert * R * F + inner[:, None] * R + rank[None, :]
    if LOW1:
        tl.store(db1 + along, tl.cast(factor1, tl.float32) * db1_tile, mask=inside)
    if LOW3:
        tl.store(db3 + along, tl.cast(factor3, tl.float32) * db3_tile, mask=inside)
    if LOW2:
        across = expert * R * F + rank[None, :] * F + inner[:, None]
        tl.store(da2 + across, da2_tile, mask=inside)
    if SCALE1:
        norm = tl.load(norm1 + expert * F + inner, mask=within, other=1.0)
        tl.store(dmagnitude1 + expert * F + inner, dscale1 / norm, mask=within)
    if SCALE3:
        norm = tl.load(norm3 + expert * F + inner, mask=within, other=1.0)
        tl.store(dmagnitude3 + expert * F + inner, dscale3 / norm, mask=within)
