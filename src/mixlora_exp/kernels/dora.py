"""Row norms of `W + s B A` for DoRA experts, without forming `B A`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dora_norms", "squared_row_norms"]


CHUNK_ELEMENTS = 2**22
"""Elements of W that exist in float32 at a time: 16 MB."""


def _row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Some rows of W at a time: W in float32 would be twice the size of a bf16 model's."""
    return weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))


@torch.no_grad()
def squared_row_norms(weight: Tensor) -> Tensor:
    """||W||^2 per output row, (out,), in float32 or better. weight: (out, in)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat([rows.to(dtype).square().sum(dim=-1) for rows in _row_chunks(weight)])


@torch.no_grad()
def dora_norms(
    weight: Tensor, squared_norms: Tensor, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """||W + s B_e A_e|| per output row of each expert, (E, out).

    weight: (out, in); squared_norms: (out,) as of `squared_row_norms`; a: (E, R, in);
    b: (E, out, R). By the identity

        ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B>_row + s^2 <B (A A^T), B>_row

    so W is read once, for `W A^T` of all experts in one product of E R columns. The products run
    in float32 or better: the squares of bf16 numbers would lose the small difference.
    No gradient flows through the norm (DoRA, Section 4.3).
    """
    num_experts, rank, _ = a.shape
    dtype = squared_norms.dtype
    a, b = a.to(dtype), b.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        columns = a.flatten(0, 1).T
        cross = torch.cat([rows.to(dtype) @ columns for rows in _row_chunks(weight)])
        cross = cross.unflatten(1, (num_experts, rank))
        cross = (cross.transpose(0, 1) * b).sum(dim=-1)
        gram = a @ a.transpose(1, 2)
        squared = squared_norms + 2 * scaling * cross + scaling**2 * ((b @ gram) * b).sum(dim=-1)
    # Rounding can push a norm that is zero below it.
    return squared.clamp(min=0).sqrt()
