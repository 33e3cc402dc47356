"""Operators of DoRA's down projection: `y = sum_k w scale_e (W2 h + factor B_e low)`, whose scale
stands before the sum, so that each row has an output of its own. The words are those of `columns`.
"""

from __future__ import annotations

import torch
import triton

from mixlora_exp.kernels.triton.columns import empty
from mixlora_exp.kernels.triton.narrow import matrices_kernel, scaled_kernel, to_columns_kernel
from mixlora_exp.kernels.triton.operators import on_device_of, operator, start
from mixlora_exp.kernels.triton.tiles import padded, tiles_of

__all__ = ["scaled_from_columns", "scaled_matrix_gradients", "scaled_to_columns"]


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
    """Return (low, doutput, dweights), the backward pass of `scaled_from_columns`: `factor B_e
    doutput` (T K, R), `w scale_e dy` (T K, width) by row, and by token (T, K) float32.

    dy: (T, width); matrix: (E, width, R); scale: (E, width); output: (T K, width) by row.
    """
    (count, width), top_k = dy.shape, experts.shape[1]
    rank = matrix.shape[2]
    low, doutput = empty(dy, count * top_k, rank), torch.empty_like(output)
    dweights = empty(dy, count, top_k, dtype=torch.float32)
    tiles = tiles_of("narrow", padded(rank), dy.dtype, dy.device)
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
    """Return (y, output, low): DoRA's down projection, `y = sum_k w scale_e output` (T, width)
    with, by row, `output = raw + factor B_e low` (T K, width); low (T K, R) as in `from_columns`.

    raw: (T K, width) by row; matrix: (E, width, R); scale: (E, width).
    """
    (count, top_k), width = experts.shape, raw.shape[1]
    num_experts, _, rank = matrix.shape
    out, output = empty(raw, count, width), torch.empty_like(raw)
    low = empty(raw, count * top_k, rank)
    tiles = tiles_of("wide", padded(rank), raw.dtype, raw.device)
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
    """Return the gradients of the matrix (E, width, R) and the magnitude (E, width) of DoRA's down
    projection; doutput, output (T K, width) and low (T K, R) by row, dy (T, width)."""
    width, rank = dy.shape[1], low.shape[1]
    num_experts = starts.shape[0] - 1
    dmatrix = empty(dy, num_experts, width, rank, dtype=dtype)
    dmagnitude = empty(dy, num_experts, width, dtype=dtype)
    tiles = tiles_of("matrices", padded(rank), dy.dtype, dy.device)
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
