"""Operators of the kernels of `narrow`: the experts' low-rank products beside the frozen ones.

`tokens`, `experts`, `weights`, `slots`, `rows` and `starts` are those of `order.Order`; keys, place
and threshold those of a dropout mask on the wide tensor, keys None for none. What a pair has of the
gate stands before what it has of the up projection, empty or None without experts there.
"""

from __future__ import annotations

import torch
import triton

from mixlora_exp.kernels.triton.narrow import (
    from_columns_kernel,
    matrices_kernel,
    scaled_kernel,
    to_columns_kernel,
)
from mixlora_exp.kernels.triton.operators import on_device_of, operator, start
from mixlora_exp.kernels.triton.tiles import padded, tiles_of

__all__ = [
    "from_columns",
    "matrix_gradients",
    "scaled_from_columns",
    "scaled_matrix_gradients",
    "scaled_to_columns",
    "to_columns",
]


def _empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
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
    """`factor M_e drop(x_t)` by row, (T K, R), of one matrix or two. x: (T, width); matrices:
    (E, width, R), or across (E, R, width)."""
    (count, width), top_k = x.shape, experts.shape[1]
    matrix = matrix1 if matrix1 is not None else matrix3
    rank = matrix.shape[1 if across else 2]
    lows = [
        _empty(x, count * top_k, rank) if m is not None else _empty(x, 0)
        for m in (matrix1, matrix3)
    ]
    tiles = tiles_of("narrow", padded(rank), x.dtype)
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


@operator("scaled_to_columns")
def scaled_to_columns(
    dy: torch.Tensor,
    matrix: torch.Tensor,
    scale: torch.Tensor,
    output: torch.Tensor,
    tokens: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(low, doutput, dweights), the backward pass of `scaled_from_columns`: `factor B_e doutput`
    (T K, R), `w scale_e dy` (T K, width) by row, and by token (T, K) float32.

    dy: (T, width); matrix: (E, width, R); scale: (E, width); output: (T K, width) by row.
    """
    (count, width), top_k = dy.shape, experts.shape[1]
    rank = matrix.shape[2]
    low, doutput = _empty(dy, count * top_k, rank), torch.empty_like(output)
    dweights = _empty(dy, count, top_k, dtype=torch.float32)
    tiles = tiles_of("narrow", padded(rank), dy.dtype)
    with on_device_of(dy):
        start(
            to_columns_kernel,
            (triton.cdiv(count, tiles.rows), top_k),
            x=dy,
            matrix1=matrix,
            matrix3=None,
            scale=scale,
            raw=output,
            keys=None,
            tokens=tokens,
            experts=experts,
            weights=weights,
            slots=slots,
            low1=low,
            low3=None,
            draw=doutput,
            dweights=dweights,
            T=count,
            width=width,
            place=0,
            threshold=0,
            factor=factor,
            K=top_k,
            E=matrix.shape[0],
            R=rank,
            RANKS=padded(rank),
            LOW1=True,
            LOW3=False,
            ACROSS=False,
            SCALED=True,
            DROPPED=False,
            BT=tiles.rows,
            BD=tiles.inner,
            **tiles.options,
        )
    return low, doutput, dweights


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
    """(y (T, width), low1, low3 (T K, R), weights): `y = base1 + base3 + drop(factor sum_k M_e
    low)` of one matrix or two, or none; low and weights (T, K) float32, by token, are the sums of
    parts (splits, T K, R) and dweights (splits, T K), float32, all of as many splits."""
    (count, width), top_k = base1.shape, experts.shape[1]
    matrix = matrix1 if matrix1 is not None else matrix3
    num_experts, rank = 1, 1
    if matrix is not None:
        num_experts, rank = matrix.shape[0], matrix.shape[1 if across else 2]
    out = torch.empty_like(base1)
    lows = [
        _empty(out, count * top_k, rank) if m is not None else _empty(out, 0)
        for m in (matrix1, matrix3)
    ]
    shape = (count, top_k) if dweights is not None else (0,)
    total = _empty(out, *shape, dtype=torch.float32)
    parts = next((p for p in (parts1, parts3, dweights) if p is not None), None)
    tiles = tiles_of("wide", padded(rank), out.dtype)
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


@operator("scaled_from_columns")
def scaled_from_columns(
    raw: torch.Tensor,
    parts: torch.Tensor,
    matrix: torch.Tensor,
    scale: torch.Tensor,
    tokens: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, output, low): DoRA's down projection, `y = sum_k w scale_e output` (T, width) with, by
    row, `output = raw + factor B_e low` (T K, width); low (T K, R) as in `from_columns`.

    raw: (T K, width) by row; matrix: (E, width, R); scale: (E, width).
    """
    (count, top_k), width = experts.shape, raw.shape[1]
    num_experts, _, rank = matrix.shape
    out, output = _empty(raw, count, width), torch.empty_like(raw)
    low = _empty(raw, count * top_k, rank)
    tiles = tiles_of("wide", padded(rank), raw.dtype)
    with on_device_of(raw):
        start(
            scaled_kernel,
            (triton.cdiv(count, tiles.rows), triton.cdiv(width, tiles.inner)),
            raw=raw,
            parts=parts,
            matrix=matrix,
            scale=scale,
            tokens=tokens,
            experts=experts,
            weights=weights,
            low=low,
            output=output,
            out=out,
            T=count,
            width=width,
            splits=parts.shape[0],
            factor=factor,
            K=top_k,
            E=num_experts,
            R=rank,
            RANKS=padded(rank),
            BT=tiles.rows,
            BD=tiles.inner,
            **tiles.options,
        )
    return out, output, low


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
    """`factor sum drop(x_t) low` over the rows of each expert, in the layout of the matrices and
    `dtype`. x: (T, width); low: (T K, R) by row."""
    width, top_k, num_experts = x.shape[1], weights.shape[1], starts.shape[0] - 1
    rank = (low1 if low1 is not None else low3).shape[1]
    shape = (num_experts, rank, width) if across else (num_experts, width, rank)
    made = [_empty(x, *(shape if low is not None else (0,)), dtype=dtype) for low in (low1, low3)]
    tiles = tiles_of("matrices", padded(rank), x.dtype)
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


@operator("scaled_matrix_gradients")
def scaled_matrix_gradients(
    doutput: torch.Tensor,
    low: torch.Tensor,
    dy: torch.Tensor,
    output: torch.Tensor,
    norm: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    dtype: torch.dtype,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the matrix (E, width, R) and the magnitude (E, width) of DoRA's down
    projection; doutput, output (T K, width) and low (T K, R) by row, dy (T, width)."""
    width, rank = dy.shape[1], low.shape[1]
    num_experts = starts.shape[0] - 1
    dmatrix = _empty(dy, num_experts, width, rank, dtype=dtype)
    dmagnitude = _empty(dy, num_experts, width, dtype=dtype)
    tiles = tiles_of("matrices", padded(rank), dy.dtype)
    with on_device_of(dy):
        start(
            matrices_kernel,
            (triton.cdiv(width, tiles.inner), num_experts),
            x=doutput,
            low1=low,
            low3=None,
            dy=dy,
            raw=output,
            norm=norm,
            keys=None,
            tokens=tokens,
            weights=weights,
            rows=rows,
            starts=starts,
            dmatrix1=dmatrix,
            dmatrix3=None,
            dmagnitude=dmagnitude,
            width=width,
            place=0,
            threshold=0,
            factor=factor,
            K=weights.shape[1],
            R=rank,
            RANKS=padded(rank),
            LOW1=True,
            LOW3=False,
            ACROSS=False,
            SCALED=True,
            DROPPED=False,
            BT=tiles.rows,
            BD=tiles.inner,
            **tiles.options,
        )
    return dmatrix, dmagnitude
