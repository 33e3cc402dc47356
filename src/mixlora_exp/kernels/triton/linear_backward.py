"""Triton kernels of the gradients of a LoRA layer; names of arguments are those of `linear`.

dlow_g: (T, R_g), the gradient of `low_g`: what comes from above times B_g.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixlora_exp.kernels.triton.hashing import kept, row_hash
from mixlora_exp.kernels.triton.linear import NUMBERS
from mixlora_exp.kernels.triton.parts import dot, load_low, store_low

__all__ = ["a_kernel", "input_kernel", "scaled_backward_kernel"]


@triton.jit(do_not_specialize=["T"])
def scaled_backward_kernel(
    dy,
    frozen,
    low,
    b,
    magnitude,
    norm,
    draw,
    db,
    dmagnitude,
    T,
    F,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """The backward pass of `scaled_kernel`, its sum before the scale computed again.

    dy, frozen: (T, F). Results: draw (T, F), the gradient of that sum; db (F, R); dmagnitude (F,);
    the norm is a constant. Tiles stand as (BF, BT), the layout in which the products take them.

    Grid: (tiles of F,), each over all of T.
    """
    inner = tl.program_id(0) * BF + tl.arange(0, BF)
    within = inner < F
    rows = load_low(b, inner, within, R, PADDED).to(low.dtype.element_ty)
    length = tl.load(norm + inner, mask=within, other=1.0).to(tl.float32)
    scale = tl.load(magnitude + inner, mask=within, other=0.0).to(tl.float32) / length
    db_tile = tl.zeros((BF, PADDED), tl.float32)
    total = tl.zeros((BF,), tl.float32)
    for start in range(0, T, BT):
        token = start + tl.arange(0, BT)
        real = token < T
        inside = within[:, None] & real[None, :]
        offsets = token.to(tl.int64)[None, :] * F + inner[:, None]
        p = load_low(low, token, real, R, PADDED)
        raw = tl.load(frozen + offsets, mask=inside, other=0.0).to(tl.float32)
        raw = dot(rows, tl.trans(p), raw)
        upper = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(upper * raw, axis=1)
        lower = (upper * scale[:, None]).to(p.dtype)
        tl.store(draw + offsets, lower, mask=inside)
        db_tile = dot(lower, p, db_tile)
    store_low(db, db_tile, inner, within, R, PADDED)
    tl.store(dmagnitude + inner, (total / length).to(dmagnitude.dtype.element_ty), mask=within)


@triton.jit
def _a(
    x,
    dlow,
    keys,
    da,
    place,
    threshold,
    factor,
    T,
    D,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute `a_kernel` of one projection."""
    inner = tl.program_id(0) * BD + tl.arange(0, BD)
    within = inner < D
    column = tl.arange(0, PADDED)
    total = tl.zeros((PADDED, BD), tl.float32)
    for start in range(0, T, BT):
        token = start + tl.arange(0, BT)
        real = token < T
        tile = tl.load(
            x + token.to(tl.int64)[:, None] * D + inner[None, :],
            mask=real[:, None] & within[None, :],
            other=0.0,
        )
        if MASKED:
            first, second = row_hash(keys, token, real, place)
            keep = kept(first[:, None], second[:, None], inner[None, :], threshold)
            tile = tl.where(keep, tile, 0.0)
        p = load_low(dlow, token, real, R, PADDED)
        total = dot(tl.trans(p), tile, total)
    tl.store(
        da + column[:, None] * D + inner[None, :],
        (tl.cast(factor, tl.float32) * total).to(da.dtype.element_ty),
        mask=(column < R)[:, None] & within[None, :],
    )


@triton.jit(do_not_specialize=NUMBERS)
def a_kernel(
    x,
    dlow0,
    dlow1,
    dlow2,
    keys0,
    keys1,
    keys2,
    da0,
    da1,
    da2,
    place0,
    place1,
    place2,
    threshold0,
    threshold1,
    threshold2,
    factor0,
    factor1,
    factor2,
    T,
    D,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    MASKED0: tl.constexpr,
    MASKED1: tl.constexpr,
    MASKED2: tl.constexpr,
    G: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """`dA_g = f_g dlow_g^T drop_g(x)`. Grid: (tiles of D, G), each over all of T."""
    which = tl.program_id(1)
    if which == 0:
        _a(x, dlow0, keys0, da0, place0, threshold0, factor0, T, D, R0, PADDED, MASKED0, BT, BD)
    if G > 1:  # noqa: SIM102 what is false when compiled must stand alone
        if which == 1:
            _a(x, dlow1, keys1, da1, place1, threshold1, factor1, T, D, R1, PADDED, MASKED1, BT, BD)
    if G > 2:  # noqa: SIM102
        if which == 2:
            _a(x, dlow2, keys2, da2, place2, threshold2, factor2, T, D, R2, PADDED, MASKED2, BT, BD)


@triton.jit
def _input(
    frozen,
    dlow,
    a,
    keys,
    token,
    inner,
    place,
    threshold,
    factor,
    T,
    D,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return a tile of what one projection gives x."""
    real, within = token < T, inner < D
    column = tl.arange(0, PADDED)
    p = load_low(dlow, token, real, R, PADDED)
    rows = tl.load(
        a + column[:, None] * D + inner[None, :],
        mask=(column < R)[:, None] & within[None, :],
        other=0.0,
    )
    tile = tl.cast(factor, tl.float32) * dot(p, rows.to(p.dtype), None)
    if MASKED:
        first, second = row_hash(keys, token, real, place)
        tile = tl.where(kept(first[:, None], second[:, None], inner[None, :], threshold), tile, 0.0)
    offsets = token.to(tl.int64)[:, None] * D + inner[None, :]
    inside = real[:, None] & within[None, :]
    return tile + tl.load(frozen + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS)
def input_kernel(
    frozen0,
    frozen1,
    frozen2,
    dlow0,
    dlow1,
    dlow2,
    a0,
    a1,
    a2,
    keys0,
    keys1,
    keys2,
    dx,
    place0,
    place1,
    place2,
    threshold0,
    threshold1,
    threshold2,
    factor0,
    factor1,
    factor2,
    T,
    D,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    MASKED0: tl.constexpr,
    MASKED1: tl.constexpr,
    MASKED2: tl.constexpr,
    G: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """`dx = sum_g (frozen_g + f_g drop_g(dlow_g A_g))`, (T, D); frozen_g: what W_g gives it.

    Grid: (token tiles, tiles of D).
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inner = tl.program_id(1) * BD + tl.arange(0, BD)
    total = _input(
        frozen0, dlow0, a0, keys0, token, inner, place0, threshold0, factor0,
        T, D, R0, PADDED, MASKED0,
    )  # fmt: skip
    if G > 1:
        total += _input(
            frozen1, dlow1, a1, keys1, token, inner, place1, threshold1, factor1,
            T, D, R1, PADDED, MASKED1,
        )  # fmt: skip
    if G > 2:
        total += _input(
            frozen2, dlow2, a2, keys2, token, inner, place2, threshold2, factor2,
            T, D, R2, PADDED, MASKED2,
        )  # fmt: skip
    offsets = token.to(tl.int64)[:, None] * D + inner[None, :]
    inside = (token < T)[:, None] & (inner < D)[None, :]
    tl.store(dx + offsets, total.to(dx.dtype.element_ty), mask=inside)
