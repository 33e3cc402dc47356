"""Row norms of `W + s B A` for DoRA, without forming `B A`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dora_norms", "squared_row_norms"]


CHUNK_ELEMENTS = 2**22
"""Elements of W that exist in float32 at a time: 16 MB."""


def _row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Split W into blocks of rows: W in float32 would be twice the size of a bf16 model's."""
    return weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))


@torch.no_grad()
def squared_row_norms(weight: Tensor) -> Tensor:
    """Compute ||W||^2 per output row, (out,), in float32 or better. weight: (out, in)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat([rows.to(dtype).square().sum(dim=-1) for rows in _row_chunks(weight)])


def bf16_parts(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three bf16 tensors whose sum is `values` (float32) exactly: its upper, middle and
    lower eight bits. Each is a view of a float32 tensor's upper halves."""
    parts, rest = [], values.contiguous()
    for _ in range(3):
        # Little-endian: of the two halves of a float32 the second is the number cut to bf16.
        parts.append(rest.view(torch.bfloat16)[..., 1::2])
        if len(parts) < 3:
            rest = rest - parts[-1]
    return tuple(parts)


EXACT = ("cuda", "meta")
"""Devices with a product of bf16 matrices in float32: `meta` computes nothing, but has it."""


def _multiply(weight: Tensor, columns: Tensor, out: Tensor) -> None:
    """Write `weight columns^T` of bf16 matrices, summed and stored in float32, to `out`."""
    torch.mm(weight, columns.T, out_dtype=torch.float32, out=out)


def _products(weights: Sequence[Tensor], columns: Tensor) -> Tensor:
    """Compute `W_n columns_n^T` in the dtype of the columns, float32 or better: (N, out, C).

    weights: N of (out, in); columns: (N, C, in).
    """
    first, dtype = weights[0], columns.dtype
    if first.dtype != torch.bfloat16 or dtype != torch.float32 or first.device.type not in EXACT:
        return torch.stack(
            [
                torch.cat([rows.to(dtype) @ own.T for rows in _row_chunks(weight)])
                for weight, own in zip(weights, columns, strict=True)
            ]
        )
    parts = torch.cat(bf16_parts(columns), dim=1)
    made = columns.new_empty(len(weights), len(first), parts.shape[1])
    for weight, part, out in zip(weights, parts, made, strict=True):
        _multiply(weight, part, out)
    return made.unflatten(2, (3, -1)).sum(dim=2)


@torch.no_grad()
def dora_norms(
    weights: Sequence[Tensor], squared_norms: Tensor, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """Compute ||W_n + s B_ne A_ne|| per output row of each expert of N projections, (N, E, out).

    weights: N of (out, in); squared_norms: (N, out) as of `squared_row_norms`; a: (N, E, R, in);
    b: (N, E, out, R). By the identity

        ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B>_row + s^2 <B (A A^T), B>_row

    so each W is read once, for `W A^T` of all its experts in one product. Products are added up in
    float32 or better: the squares of bf16 numbers would lose the small difference. No gradient
    flows through the norm (DoRA, Section 4.3).
    """
    dtype = squared_norms.dtype
    a, b = a.to(dtype), b.to(dtype)
    with torch.autocast(a.device.type, enabled=False):
        cross = _products(weights, a.flatten(1, 2)).unflatten(2, a.shape[1:3])
        cross = (cross.transpose(1, 2) * b).sum(dim=-1)
        gram = ((b @ (a @ a.mT)) * b).sum(dim=-1)
        squared = squared_norms.unsqueeze(1) + 2 * scaling * cross + scaling**2 * gram
    # Rounding can push a norm that is zero below it.
    return squared.clamp_(min=0).sqrt_()
