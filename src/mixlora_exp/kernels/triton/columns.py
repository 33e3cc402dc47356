"""Operators of the kernels of `narrow`: the experts' low-rank products beside the frozen ones.

`tokens`, `experts`, `weights`, `slots`, `rows` and `starts` are those of `order.SlotOrder`; keys,
place and threshold those of a dropout mask on the wide tensor, keys None for none. What a pair has
of the gate stands before what it has of the up projection, empty or None without experts there.
"""

from __future__ import annotations

import torch
import triton

from mixlora_exp.kernels.triton.narrow import (
    from_columns_kernel,
    matrices_kernel,
    to_columns_kernel,
)
from mixlora_exp.kernels.triton.operators import on_device_of, operator, start
from mixlora_exp.kernels.triton.tiles import padded, tiles_of

__all__ = ["empty", "from_columns", "matrix_gradients", "to_columns"]


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a fresh tensor on the device of another and, but for `dtype`, of its dtype."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


@operator("to_columns")
def to_columns(
    x: torch.Tensor,
    matrix1: torch.Tensor | None,
    matrix3: torch.Tensor | None,
    keys: torch.Tensor | None,
    tokens: torch.Tensor,
    experts: torch.Tensor,
    place: int,
    threshold: int,
    factor: float,
    across: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `factor M_e drop(x_t)` by row, (T K, R), of one matrix or two. x: (T, width);
    matrices: (E, width, R), or across (E, R, width)."""
    (count, width), top_k = x.shape, experts.shape[1]
    matrix = matrix1 if matrix1 is not None else matrix3
    rank = matrix.shape[1 if across else 2]
    lows = [
        empty(x, count * top_k, rank) if m is not None else empty(x, 0) for m in (matrix1, matrix3)
    ]
    tiles = tiles_of("narrow", padded(rank), x.dtype, x.device)
    with on_device_of(x):
        start(
            to_columns_kernel,
            (triton.cdiv(count, tiles.rows), top_k),
            x=x,
            matrix1=matrix1,
            matrix3=matrix3,
            scale=None,
            raw=None,
            keys=keys,
            tokens=tokens,
            experts=experts,
            weights=None,
            slots=None,
            low1=lows[0],
            low3=lows[1],
            draw=None,
            dweights=None,
            T=count,
            width=width,
            place=place,
            threshold=threshold,
            factor=factor,
            K=top_k,
            E=matrix.shape[0],
            R=rank,
            RANKS=padded(rank),
            LOW1=matrix1 is not None,
            LOW3=matrix3 is not None,
            ACROSS=across,
            SCALED=False,
            DROPPED=keys is not None,
            BT=tiles.rows,
            BD=tiles.inner,
            **tiles.options,
        )
    return lows[0], lows[1]


@operator("from_columns")
def from_columns(
    base1: torch.Tensor,
    base3: torch.Tensor | None,
    parts1: torch.Tensor | None,
    parts3: torch.Tensor | None,
    matrix1: torch.Tensor | None,
    matrix3: torch.Tensor | None,
    keys: torch.Tensor | None,
    tokens: torch.Tensor,
    experts: torch.Tensor,
    slots: torch.Tensor,
    dweights: torch.Tensor | None,
    place: int,
    threshold: int,
    factor: float,
    across: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y (T, width), low1, low3 (T K, R), weights): `y = base1 + base3 + drop(factor sum_k
    M_e low)` of one matrix or two, or none; low and weights (T, K) float32, by token, are the sums
    of parts (splits, T K, R) and dweights (splits, T K), float32, all of as many splits."""
    (count, width), top_k = base1.shape, experts.shape[1]
    matrix = matrix1 if matrix1 is not None else matrix3
    num_experts, rank = 1, 1
    if matrix is not None:
        num_experts, rank = matrix.shape[0], matrix.shape[1 if across else 2]
    out = torch.empty_like(base1)
    lows = [
        empty(out, count * top_k, rank) if m is not None else empty(out, 0)
        for m in (matrix1, matrix3)
    ]
    shape = (count, top_k) if dweights is not None else (0,)
    total = empty(out, *shape, dtype=torch.float32)
    parts = next((p for p in (parts1, parts3, dweights) if p is not None), None)
    tiles = tiles_of("wide", padded(rank), out.dtype, out.device)
    with on_device_of(out):
        start(
            from_columns_kernel,
            (triton.cdiv(count, tiles.rows), triton.cdiv(width, tiles.inner)),
            base1=base1,
            base3=base3,
            parts1=parts1,
            parts3=parts3,
            matrix1=matrix1,
            matrix3=matrix3,
            keys=keys,
            tokens=tokens,
            experts=experts,
            slots=slots,
            dweight_parts=dweights,
            low1=lows[0],
            low3=lows[1],
            dweights=total,
            out=out,
            T=count,
            width=width,
            splits=0 if parts is None else parts.shape[0],
            place=place,
            threshold=threshold,
            factor=factor,
            K=top_k,
            E=num_experts,
            R=rank,
            RANKS=padded(rank),
            LOW1=matrix1 is not None,
            LOW3=matrix3 is not None,
            TWO=base3 is not None,
            WEIGHTS=dweights is not None,
            ACROSS=across,
            DROPPED=keys is not None,
            BT=tiles.rows,
            BD=tiles.inner,
            **tiles.options,
        )
    return out, lows[0], lows[1], total


@operator("matrix_gradients")
def matrix_gradients(
    x: torch.Tensor,
    low1: torch.Tensor | None,
    low3: torch.Tensor | None,
    keys: torch.Tensor | None,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    dtype: torch.dtype,
    place: int,
    threshold: int,
    factor: float,
    across: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `factor sum drop(x_t) low` over the rows of each expert, in the layout of the
    matrices and `dtype`. x: (T, width); low: (T K, R) by row."""
    width, top_k, num_experts = x.shape[1], weights.shape[1], starts.shape[0] - 1
    rank = (low1 if low1 is not None else low3).shape[1]
    shape = (num_experts, rank, width) if across else (num_experts, width, rank)
    made = [empty(x, *(shape if low is not None else (0,)), dtype=dtype) for low in (low1, low3)]
    tiles = tiles_of("matrices", padded(rank), x.dtype, x.device)
    with on_device_of(x):
        start(
            matrices_kernel,
            (triton.cdiv(width, tiles.inner), num_experts),
            x=x,
            low1=low1,
            low3=low3,
            dy=None,
            raw=None,
            norm=None,
            keys=keys,
            tokens=tokens,
            weights=weights,
            rows=rows,
            starts=starts,
            dmatrix1=made[0],
            dmatrix3=made[1],
            dmagnitude=None,
            width=width,
            place=place,
            threshold=threshold,
            factor=factor,
            K=top_k,
            R=rank,
            RANKS=padded(rank),
            LOW1=low1 is not None,
            LOW3=low3 is not None,
            ACROSS=across,
            SCALED=False,
            DROPPED=keys is not None,
            BT=tiles.rows,
            BD=tiles.inner,
            **tiles.options,
        )
    return made[0], made[1]
