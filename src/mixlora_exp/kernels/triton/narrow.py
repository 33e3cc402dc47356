"""Triton kernels of the experts' low-rank products beside a frozen one: to R columns, from them,
and the gradients of their matrices.

Rows, positions and the words for block sizes are those of `ffn`; `width` is the number of columns
of the wide tensor, D, of which a tile has `BD`. A matrix is (E, width, R), as B is, or with ACROSS
(E, R, width), as A is. `LOW1`, `LOW3`: the two matrices that share the wide tensor, of gate and up,
where there are such; one alone is the first or the second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixlora_exp.kernels.triton.hashing import kept, row_hash
from mixlora_exp.kernels.triton.parts import (
    dot,
    is_met,
    load_low,
    load_matrix,
    slot_of,
    store_low,
)

__all__ = ["from_columns_kernel", "matrices_kernel", "scaled_kernel", "to_columns_kernel"]


@triton.jit(do_not_specialize=["T", "place", "threshold"])
def to_columns_kernel(
    x,
    matrix1,
    matrix3,
    scale,
    raw,
    keys,
    tokens,
    experts,
    weights,
    slots,
    low1,
    low3,
    draw,
    dweights,
    T,
    width,
    place,
    threshold,
    factor,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    ACROSS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPPED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """low (T K, R), in each row `factor M_e drop(x_t)`.

    x: (T, width). SCALED: DoRA's backward pass, x is dy; the product takes `w scale_e dy` (scale
    (E, width)), which is stored as draw (T K, width), 0 in an empty slot, and dweights (T, K), by
    token, gets `sum scale_e dy raw`; raw (T K, width): the output of the row before its scale.
    Grid: (token tiles, K).
    """
    position = tl.program_id(0) * BT + tl.arange(0, BT)
    real = position < T
    token = tl.load(tokens + position, mask=real, other=0)
    k = tl.program_id(1)
    row = position * K + k
    expert, first, end = slot_of(experts, position, real, k, K, E)
    filled = real & (expert < E)
    sums1 = tl.zeros((BT, RANKS), tl.float32)
    sums3 = tl.zeros((BT, RANKS), tl.float32)
    if DROPPED:
        hash1, hash2 = row_hash(keys, token, real, place)
    if SCALED:
        weight = tl.load(weights + row, mask=real, other=0.0)
        dweight = tl.zeros((BT,), tl.float32)
    for start in range(0, width, BD):
        inner = start + tl.arange(0, BD)
        within = inner < width
        inside = filled[:, None] & within[None, :]
        offsets = token.to(tl.int64)[:, None] * width + inner[None, :]
        tile = tl.load(x + offsets, mask=inside, other=0.0)
        if DROPPED:
            keep = kept(hash1[:, None], hash2[:, None], inner[None, :], threshold)
            tile = tl.where(keep, tile, 0.0)
        if SCALED:
            own = row.to(tl.int64)[:, None] * width + inner[None, :]
            s = tl.load(scale + expert[:, None] * width + inner[None, :], mask=inside, other=0.0)
            unweighted = tile.to(tl.float32) * s.to(tl.float32)
            output = tl.load(raw + own, mask=inside, other=0.0).to(tl.float32)
            dweight += tl.sum(unweighted * output, axis=1)
            tile = (unweighted * weight[:, None]).to(x.dtype.element_ty)
            tl.store(draw + own, tile, mask=real[:, None] & within[None, :])
        for e in range(first, end):
            mine = expert == e
            if is_met(mine):
                if LOW1:
                    matrix = load_matrix(matrix1, e, inner, within, width, R, RANKS, ACROSS)
                    sums1 += tl.where(mine[:, None], dot(tile, matrix, None), 0.0)
                if LOW3:
                    matrix = load_matrix(matrix3, e, inner, within, width, R, RANKS, ACROSS)
                    sums3 += tl.where(mine[:, None], dot(tile, matrix, None), 0.0)
    if LOW1:
        store_low(low1, tl.cast(factor, tl.float32) * sums1, row, real, R, RANKS)
    if LOW3:
        store_low(low3, tl.cast(factor, tl.float32) * sums3, row, real, R, RANKS)
    if SCALED:
        slot = tl.load(slots + row, mask=real, other=0)
        tl.store(dweights + token * K + slot, dweight, mask=real)


@triton.jit
def _add_up(parts, total, row, real, splits, count, R: tl.constexpr, RANKS: tl.constexpr):
    """Return rows of the sum of parts (splits, count, R) in the dtype of `total`, where the
    programs of the first tile leave it."""
    found = tl.zeros((row.shape[0], RANKS), tl.float32)
    for split in range(splits):
        found += load_low(parts + split * R * count.to(tl.int64), row, real, R, RANKS)
    found = found.to(total.dtype.element_ty)
    if tl.program_id(1) == 0:
        store_low(total, found, row, real, R, RANKS)
    return found


@triton.jit
def _wide(
    low,
    columns,
    matrix,
    expert,
    first,
    end,
    inner,
    within,
    width,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Compute `low + M_e columns` by row: (BT, BD)."""
    for e in range(first, end):
        mine = expert == e
        if is_met(mine):
            tile = load_matrix(matrix, e, inner, within, width, R, RANKS, ACROSS)
            low = dot(tl.where(mine[:, None], columns, 0.0), tl.trans(tile), low)
    return low


@triton.jit(do_not_specialize=["T", "splits", "place", "threshold"])
def from_columns_kernel(
    base1,
    base3,
    parts1,
    parts3,
    matrix1,
    matrix3,
    keys,
    tokens,
    experts,
    slots,
    dweight_parts,
    low1,
    low3,
    dweights,
    out,
    T,
    width,
    splits,
    place,
    threshold,
    factor,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    TWO: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACROSS: tl.constexpr,
    DROPPED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """out (T, width) = base1 + base3 + drop(factor sum_k M_e low), low the sums of the parts.

    base1, with TWO base3 (T, width), of which out may be one; parts (splits, T K, R) float32; low
    (T K, R) keeps their sums. WEIGHTS: likewise dweights (T, K), by token, of dweight_parts
    (splits, T K). Grid: (token tiles, width tiles).
    """
    position = tl.program_id(0) * BT + tl.arange(0, BT)
    real = position < T
    token = tl.load(tokens + position, mask=real, other=0)
    inner = tl.program_id(1) * BD + tl.arange(0, BD)
    within = inner < width
    low = tl.zeros((BT, BD), tl.float32)
    for k in range(K):
        row = position * K + k
        expert, first, end = slot_of(experts, position, real, k, K, E)
        if LOW1:
            columns = _add_up(parts1, low1, row, real, splits, T * K, R, RANKS)
            low = _wide(
                low, columns, matrix1, expert, first, end, inner, within, width, R, RANKS, ACROSS
            )
        if LOW3:
            columns = _add_up(parts3, low3, row, real, splits, T * K, R, RANKS)
            low = _wide(
                low, columns, matrix3, expert, first, end, inner, within, width, R, RANKS, ACROSS
            )
        # Apart: the compiler knows the one, the other is known when it runs.
        if WEIGHTS:  # noqa: SIM102
            if tl.program_id(1) == 0:
                dweight = tl.zeros((BT,), tl.float32)
                for split in range(splits):
                    dweight += tl.load(dweight_parts + split * T * K + row, mask=real, other=0.0)
                slot = tl.load(slots + row, mask=real, other=0)
                tl.store(dweights + token * K + slot, dweight, mask=real)
    if DROPPED:
        hash1, hash2 = row_hash(keys, token, real, place)
        keep = kept(hash1[:, None], hash2[:, None], inner[None, :], threshold)
        low = tl.where(keep, low, 0.0)
    inside = real[:, None] & within[None, :]
    offsets = token.to(tl.int64)[:, None] * width + inner[None, :]
    total = tl.cast(factor, tl.float32) * low + tl.load(base1 + offsets, mask=inside, other=0.0).to(
        tl.float32
    )
    if TWO:
        total += tl.load(base3 + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "splits"])
def scaled_kernel(
    raw,
    parts,
    matrix,
    scale,
    tokens,
    experts,
    weights,
    low,
    output,
    out,
    T,
    width,
    splits,
    factor,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """DoRA's down projection: out (T, width) = `sum_k w scale_e output`, and by row output
    (T K, width) = `raw + factor B_e low`, low as in `from_columns_kernel`.

    Grid: (token tiles, width tiles).
    """
    position = tl.program_id(0) * BT + tl.arange(0, BT)
    real = position < T
    token = tl.load(tokens + position, mask=real, other=0)
    inner = tl.program_id(1) * BD + tl.arange(0, BD)
    within = inner < width
    dtype = out.dtype.element_ty
    total = tl.zeros((BT, BD), tl.float32)
    for k in range(K):
        row = position * K + k
        expert, first, end = slot_of(experts, position, real, k, K, E)
        inside = (real & (expert < E))[:, None] & within[None, :]
        columns = _add_up(parts, low, row, real, splits, T * K, R, RANKS)
        y = tl.zeros((BT, BD), tl.float32)
        y = _wide(y, columns, matrix, expert, first, end, inner, within, width, R, RANKS, False)
        own = row.to(tl.int64)[:, None] * width + inner[None, :]
        y = tl.cast(factor, tl.float32) * y + tl.load(raw + own, mask=inside, other=0.0).to(
            tl.float32
        )
        tl.store(output + own, y.to(dtype), mask=inside)
        s = tl.load(scale + expert[:, None] * width + inner[None, :], mask=inside, other=0.0)
        weight = tl.load(weights + row, mask=real, other=0.0)
        total += weight[:, None] * s.to(tl.float32) * y
    offsets = token.to(tl.int64)[:, None] * width + inner[None, :]
    tl.store(out + offsets, total.to(dtype), mask=real[:, None] & within[None, :])


@triton.jit(do_not_specialize=["place", "threshold"])
def matrices_kernel(
    x,
    low1,
    low3,
    dy,
    raw,
    norm,
    keys,
    tokens,
    weights,
    rows,
    starts,
    dmatrix1,
    dmatrix3,
    dmagnitude,
    width,
    place,
    threshold,
    factor,
    K: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    LOW1: tl.constexpr,
    LOW3: tl.constexpr,
    ACROSS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPPED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """The gradients of matrices: dmatrix = `factor sum drop(x_t) low` over the rows of expert e.

    x: (T, width) by token; low: (T K, R). SCALED: x (T K, width) is by row, and dmagnitude
    (E, width) gets `sum w dy raw / norm`; dy (T, width), raw (T K, width), norm (E, width).
    Grid: (width tiles, E).
    """
    inner = tl.program_id(0) * BD + tl.arange(0, BD)
    within = inner < width
    expert = tl.program_id(1)
    sums1 = tl.zeros((BD, RANKS), tl.float32)
    sums3 = tl.zeros((BD, RANKS), tl.float32)
    dscale = tl.zeros((BD,), tl.float32)
    end = tl.load(starts + expert + 1)
    for first in range(tl.load(starts + expert), end, BT):
        index = first + tl.arange(0, BT)
        valid = index < end
        row = tl.load(rows + index, mask=valid, other=0)
        token = tl.load(tokens + row // K, mask=valid, other=0)
        inside = within[:, None] & valid[None, :]
        offsets = token.to(tl.int64)[None, :] * width + inner[:, None]
        own = row.to(tl.int64)[None, :] * width + inner[:, None]
        if SCALED:
            tile = tl.load(x + own, mask=inside, other=0.0)
            weight = tl.load(weights + row, mask=valid, other=0.0)
            upstream = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
            output = tl.load(raw + own, mask=inside, other=0.0).to(tl.float32)
            dscale += tl.sum(weight[None, :] * upstream * output, axis=1)
        else:
            tile = tl.load(x + offsets, mask=inside, other=0.0)
        if DROPPED:
            hash1, hash2 = row_hash(keys, token, valid, place)
            keep = kept(hash1[None, :], hash2[None, :], inner[:, None], threshold)
            tile = tl.where(keep, tile, 0.0)
        if LOW1:
            sums1 = dot(tile, load_low(low1, row, valid, R, RANKS), sums1)
        if LOW3:
            sums3 = dot(tile, load_low(low3, row, valid, R, RANKS), sums3)
    rank = tl.arange(0, RANKS)
    if ACROSS:
        places = expert * R * width + rank[None, :] * width + inner[:, None]
    else:
        places = expert * R * width + inner[:, None] * R + rank[None, :]
    inside = within[:, None] & (rank < R)[None, :]
    if LOW1:
        tl.store(dmatrix1 + places, tl.cast(factor, tl.float32) * sums1, mask=inside)
    if LOW3:
        tl.store(dmatrix3 + places, tl.cast(factor, tl.float32) * sums3, mask=inside)
    if SCALED:
        over = tl.load(norm + expert * width + inner, mask=within, other=1.0)
        tl.store(dmagnitude + expert * width + inner, dscale / over, mask=within)
