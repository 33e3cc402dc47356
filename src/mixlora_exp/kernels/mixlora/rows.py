"""The (token, slot) pairs of a block of tokens, sorted by expert: products over expert segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.dropout import DropMask

__all__ = ["Rows", "blocks", "sort_rows"]

BLOCK_ROWS = 2048
# oneDNN, which computes bf16 products, compiles a kernel for each new shape: rounded to this many
# rows, an expert's share has few shapes (7 times faster than without at D = 576).
ROUND_ROWS = 32


@dataclass(frozen=True, slots=True)
class Rows:
    """The (token, slot) pairs of one block, sorted by expert.

    tokens (rows,): row to token of the block; weights (rows, 1); position (tokens, K): where a
    pair's row is; segments: (expert, first row, end). Rows that fill up a segment repeat one of its
    tokens with weight 0.
    """

    tokens: Tensor
    weights: Tensor
    position: Tensor
    segments: list[tuple[int, int, int]]

    def combine(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum over the slots of each token, weighted by `weights` (tokens, K): (tokens, width)."""
        return functional.embedding_bag(self.position, rows, per_sample_weights=weights, mode="sum")

    def multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Each row times its expert's matrix. rows: (rows, in); matrices: (E, in, out)."""
        out = rows.new_empty(rows.shape[0], matrices.shape[-1])
        for expert, first, end in self.segments:
            torch.mm(rows[first:end], matrices[expert], out=out[first:end])
        return out

    def add_product(self, out: Tensor, rows: Tensor, matrices: Tensor, factor: float = 1) -> None:
        """`out += factor * rows @ matrix of the row's expert`, in place."""
        for expert, first, end in self.segments:
            out[first:end].addmm_(rows[first:end], matrices[expert], alpha=factor)

    def add_outer(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out[e] += left^T right` over the rows of each expert. out: (E, l, r)."""
        for expert, first, end in self.segments:
            out[expert].add_(torch.mm(left[first:end].T, right[first:end]))

    def scaled(self, rows: Tensor, factors: Tensor) -> Tensor:
        """Each row times its expert's row of `factors` (E, width), elementwise: a new tensor."""
        out = torch.empty_like(rows)
        for expert, first, end in self.segments:
            torch.mul(rows[first:end], factors[expert], out=out[first:end])
        return out

    def add_sums(self, out: Tensor, rows: Tensor) -> None:
        """`out[e] +=` the sum of the rows of each expert. out: (E, width)."""
        for expert, first, end in self.segments:
            out[expert].add_(rows[first:end].sum(dim=0, dtype=out.dtype))

    def zero(self, rows: Tensor, mask: DropMask) -> Tensor:
        """`rows` with the elements zero that `mask`, over the block's tokens, drops."""
        if not mask.is_sparse:
            return torch.where(mask.elements[self.tokens], rows, 0.0)
        width = mask.shape[1]
        token = torch.div(mask.elements, width, rounding_mode="floor")
        column = mask.elements - token * width
        elements = (self.position[token] * width + column.unsqueeze(1)).flatten()
        return rows.clone().view(-1).index_fill_(0, elements, 0.0).view(rows.shape)


def sort_rows(experts: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype) -> Rows:
    """Sort the pairs of a block. experts, weights: (tokens, K); dtype: that of the products."""
    top_k = experts.shape[1]
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts)
    # A few rows (generation, token by token) have few shapes anyway, and would be mostly filling.
    few = dtype in (torch.float32, torch.float64) or len(flat) <= ROUND_ROWS
    step = 1 if few else ROUND_ROWS
    rounded = (counts + step - 1) // step * step
    last = (counts.cumsum(0) - 1).clamp(min=0)
    pairs = order[last].repeat_interleave(rounded)
    shift = (rounded - counts).cumsum(0) - (rounded - counts)
    places = torch.arange(len(flat)) + shift.repeat_interleave(counts)
    pairs[places] = order
    row_weights = weights.new_zeros(len(pairs))
    row_weights[places] = weights.flatten()[order]
    position = torch.empty_like(order)
    position[order] = places
    ends = rounded.cumsum(0).tolist()
    starts = [0, *ends]
    segments = [(e, s, z) for e, (s, z) in enumerate(zip(starts, ends, strict=False)) if s < z]
    return Rows(
        torch.div(pairs, top_k, rounding_mode="floor"),
        row_weights.to(dtype).unsqueeze(1),
        position.view(-1, top_k),
        segments,
    )


def blocks(tokens: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Token ranges of equal size whose pairs number about `BLOCK_ROWS` at most."""
    count = -(-tokens * top_k // BLOCK_ROWS)
    size = -(-tokens // count)
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)
