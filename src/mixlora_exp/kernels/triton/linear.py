"""Triton kernels of LoRA and DoRA of linear layers that share their input, forward pass.

    y_g = scale_g (W_g x + B_g low_g),   low_g = f_g A_g drop_g(x),   scale_g = m_g / norm_g

for the one to three projections g of a group: q, k and v of an attention block, gate and up of a
feed-forward block, or any projection by itself. `f_g` is LoRA's scaling times what dropout
multiplies kept elements by; `scale_g` is DoRA's, else 1. The frozen products `W_g x` and LoRA's
`B_g low_g` are left to torch.

x: (T, D); A_g: (R_g, D); B_g: (F_g, R_g); low_g: (T, R_g). A, B, m and norm are read in whatever
dtype they have and rounded to that of x; sums are float32. A program holds a whole sum, so that
nothing is added afterwards and the same input gives the same bits. PADDED is the largest R_g, a
power of two of at least 16. MASKED_g: the projection has a dropout mask, of `keys` (T,), `place`
and `threshold` as in `hashing`. Pointers beyond `G` projections are None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixlora_exp.kernels.triton.hashing import kept, row_hash
from mixlora_exp.kernels.triton.parts import dot, load_low, store_low

__all__ = ["NUMBERS", "low_kernel", "scaled_kernel"]

NUMBERS = ["T", *(f"{name}{i}" for name in ("place", "threshold") for i in range(3))]
"""Arguments of which no value is compiled for."""


@triton.jit
def _low(
    x,
    a,
    keys,
    low,
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
    """Compute `low_kernel` of one projection."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = token < T
    column = tl.arange(0, PADDED)
    if MASKED:
        first, second = row_hash(keys, token, real, place)
    total = tl.zeros((BT, PADDED), tl.float32)
    for start in range(0, D, BD):
        inner = start + tl.arange(0, BD)
        within = inner < D
        tile = tl.load(
            x + token.to(tl.int64)[:, None] * D + inner[None, :],
            mask=real[:, None] & within[None, :],
            other=0.0,
        )
        if MASKED:
            keep = kept(first[:, None], second[:, None], inner[None, :], threshold)
            tile = tl.where(keep, tile, 0.0)
        rows = tl.load(
            a + column[:, None] * D + inner[None, :],
            mask=(column < R)[:, None] & within[None, :],
            other=0.0,
        )
        total = dot(tile, tl.trans(rows.to(tile.dtype)), total)
    store_low(low, tl.cast(factor, tl.float32) * total, token, real, R, PADDED)


@triton.jit(do_not_specialize=NUMBERS)
def low_kernel(
    x,
    a0,
    a1,
    a2,
    keys0,
    keys1,
    keys2,
    low0,
    low1,
    low2,
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
    """`low_g = f_g A_g drop_g(x)`. Grid: (token tiles, G)."""
    which = tl.program_id(1)
    if which == 0:
        _low(x, a0, keys0, low0, place0, threshold0, factor0, T, D, R0, PADDED, MASKED0, BT, BD)
    if G > 1:  # noqa: SIM102 what is false when compiled must stand alone
        if which == 1:
            _low(x, a1, keys1, low1, place1, threshold1, factor1, T, D, R1, PADDED, MASKED1, BT, BD)
    if G > 2:  # noqa: SIM102
        if which == 2:
            _low(x, a2, keys2, low2, place2, threshold2, factor2, T, D, R2, PADDED, MASKED2, BT, BD)


@triton.jit(do_not_specialize=["T"])
def scaled_kernel(
    frozen,
    low,
    b,
    magnitude,
    norm,
    y,
    T,
    F,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """DoRA's `y = magnitude / norm (frozen + low B^T)`. frozen, y: (T, F); magnitude, norm: (F,).

    Grid: (token tiles, tiles of F).
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = token < T
    inner = tl.program_id(1) * BF + tl.arange(0, BF)
    within = inner < F
    offsets = token.to(tl.int64)[:, None] * F + inner[None, :]
    inside = real[:, None] & within[None, :]
    p = load_low(low, token, real, R, PADDED)
    rows = load_low(b, inner, within, R, PADDED).to(p.dtype)
    raw = tl.load(frozen + offsets, mask=inside, other=0.0).to(tl.float32)
    raw = dot(p, tl.trans(rows), raw)
    scale = tl.load(magnitude + inner, mask=within, other=0.0).to(tl.float32)
    scale /= tl.load(norm + inner, mask=within, other=1.0).to(tl.float32)
    tl.store(y + offsets, (raw * scale[None, :]).to(y.dtype.element_ty), mask=inside)
