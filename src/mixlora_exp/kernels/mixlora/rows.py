"""The (token, slot) pairs of a block of tokens, sorted by expert: products over expert segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.dropout import DropMask

__all__ = ["Rows", "blocks", "sort_rows", "sum_by_token"]

BLOCK_ROWS = 2048
# oneDNN, which computes bf16 products, compiles a kernel for each new shape: rounded to this many
# rows, an expert's share has few shapes (7 times faster than without at D = 576).
ROUND_ROWS = 32


def sum_by_token(
    rows: Tensor, numbers: Tensor, counts: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The sum of some rows for each token, (tokens, width).

    rows: (rows, width); numbers: (pairs,) which rows, those of one token after another's; counts:
    (tokens,) how many each has; weights: (pairs,) what they are multiplied by.
    """
    if len(numbers) == 0:
        return rows.new_zeros(len(counts), rows.shape[1])
    starts = counts.cumsum(0) - counts
    return functional.embedding_bag(numbers, rows, starts, per_sample_weights=weights, mode="sum")


@dataclass(frozen=True, slots=True)
class Rows:
    """The filled (token, slot) pairs of one block, sorted by expert.

    pairs (P,): their numbers `token K + slot`, ascending; counts (tokens,): how many a token has;
    position (P,): where a pair's row is; shares (P,): the pairs' weights; table (tokens, K): the
    row of each slot, for an empty one the number of rows. tokens (rows,): row to token; weights
    (rows, 1); segments: (expert, first row, end). Rows that fill up a segment repeat one of its
    tokens with weight 0.
    """

    pairs: Tensor
    counts: Tensor
    position: Tensor
    shares: Tensor
    table: Tensor
    tokens: Tensor
    weights: Tensor
    segments: list[tuple[int, int, int]]

    def combine(self, rows: Tensor, *, weighted: bool = False) -> Tensor:
        """Sum over the slots of each token, with or without their weights: (tokens, width)."""
        return sum_by_token(rows, self.position, self.counts, self.shares if weighted else None)

    def of_pairs(self, values: Tensor) -> Tensor:
        """(rows, width) of what is by pair, (P, width); rows that fill up are zero."""
        out = values.new_zeros(len(self.tokens), values.shape[-1])
        out[self.position] = values
        return out

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
        elements = (self.table[token] * width + column.unsqueeze(1)).flatten()
        # One row more, for what empty slots name.
        out = rows.new_empty(len(rows) + 1, width)
        out[:-1] = rows
        out.view(-1).index_fill_(0, elements, 0.0)
        return out[:-1]


def sort_rows(experts: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype) -> Rows:
    """Sort the filled pairs of a block. experts, weights: (tokens, K); dtype: of the products."""
    top_k = experts.shape[1]
    filled = weights != 0
    pairs = filled.flatten().nonzero().flatten()
    flat = experts.flatten()[pairs]
    shares = weights.flatten()[pairs].to(dtype)
    order = flat.argsort(stable=True)
    numbers = flat.bincount(minlength=num_experts)
    # A few rows (generation, token by token) have few shapes anyway, and would be mostly filling.
    few = dtype in (torch.float32, torch.float64) or len(flat) <= ROUND_ROWS
    step = 1 if few else ROUND_ROWS
    rounded = (numbers + step - 1) // step * step
    last = (numbers.cumsum(0) - 1).clamp(min=0)
    shift = (rounded - numbers).cumsum(0) - (rounded - numbers)
    places = torch.arange(len(flat)) + shift.repeat_interleave(numbers)
    chosen = order[last].repeat_interleave(rounded) if len(flat) else order.clone()
    chosen[places] = order
    row_weights = shares.new_zeros(len(chosen))
    row_weights[places] = shares[order]
    position = torch.empty_like(order)
    position[order] = places
    ends = rounded.cumsum(0).tolist()
    starts = [0, *ends]
    segments = [(e, s, z) for e, (s, z) in enumerate(zip(starts, ends, strict=False)) if s < z]
    tokens = torch.div(pairs[chosen], top_k, rounding_mode="floor")
    table = torch.full(experts.shape, len(chosen)).masked_scatter_(filled, position)
    weights = row_weights.unsqueeze(1)
    return Rows(pairs, filled.sum(dim=1), position, shares, table, tokens, weights, segments)


def blocks(tokens: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Token ranges of equal size whose pairs number about `BLOCK_ROWS` at most."""
    count = max(1, -(-tokens * top_k // BLOCK_ROWS))
    size = max(1, -(-tokens // count))
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)
