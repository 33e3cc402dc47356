"""The (token, slot) pairs of a block of tokens, sorted by expert: products over expert segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.dropout import DropMask

__all__ = ["Piece", "Rows", "blocks", "sort_rows", "sum_by_token"]

BLOCK_ROWS = 2048
# oneDNN, which computes bf16 products, compiles a kernel for each new shape: rounded to this many
# rows, an expert's share has few shapes (7 times faster than without at D = 576).
ROUND_ROWS = 32
# What is done to a piece of the rows, one operation after another, should find it in a core's
# cache: an operation on matrices of 2,048 rows from memory takes up to five times as long.
PIECE_ELEMENTS = 2**19
PIECE_ROWS = 128
"""A piece has at least as many, where there are: products of fewer rows are slow."""

Segment = tuple[int, int, int, int]
"""(expert, first row, end of the filled rows, end)."""


def sum_by_token(
    rows: Tensor, numbers: Tensor, counts: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the sum of some rows for each token, (tokens, width).

    rows: (rows, width); numbers: (pairs,) which rows, those of one token after another's; counts:
    (tokens,) how many each has; weights: (pairs,) what they are multiplied by.
    """
    if len(numbers) == 0:
        return rows.new_zeros(len(counts), rows.shape[1])
    starts = counts.cumsum(0) - counts
    return functional.embedding_bag(numbers, rows, starts, per_sample_weights=weights, mode="sum")


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of `Rows`, few enough for a cache.

    span: which rows. pairs, tokens: (rows,), of which of the filled pairs and of which token each
    is. weights: (rows, 1), zero of what fills up. segments: their rows count from the piece's
    first. dropped: flat numbers of the elements of (rows, F) that dropout zeroes, some of them
    more than once, or (rows, F) bool, true where it does not, or None for no dropout.
    """

    span: slice
    pairs: Tensor
    tokens: Tensor
    weights: Tensor
    segments: list[Segment]
    dropped: Tensor | None

    def by_pair(self, values: Tensor) -> Tensor:
        """Gather values (P, width) of filled (token, slot) pairs into padded rows (rows, width);
        padding rows are zero."""
        out = values.index_select(0, self.pairs)
        for _, _, filled, end in self.segments:
            if filled < end:
                out[filled:end].zero_()
        return out

    def by_token(self, values: Tensor) -> Tensor:
        """Return (rows, width) of what is by token."""
        return values.index_select(0, self.tokens)

    def multiply(self, rows: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor:
        """Return each row times its expert's matrix. rows: (rows, in); matrices: (E, in, out)."""
        out = rows.new_empty(rows.shape[0], matrices.shape[-1]) if out is None else out
        for expert, first, _, end in self.segments:
            torch.mm(rows[first:end], matrices[expert], out=out[first:end])
        return out

    def add_product(self, out: Tensor, rows: Tensor, matrices: Tensor, factor: float = 1) -> None:
        """Add to `out`, in place: `out += factor * rows @ matrix of the row's expert`."""
        for expert, first, _, end in self.segments:
            out[first:end].addmm_(rows[first:end], matrices[expert], alpha=factor)

    def add_outer(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """Add to `out` (E, l, r), over the rows of each expert: `out[e] += left^T right`."""
        for expert, first, _, end in self.segments:
            one, other = left[first:end], right[first:end]
            if one.shape[1] > other.shape[1]:
                # Of the two forms of the product the faster.
                out[expert].T.add_(torch.mm(other.T, one))
            else:
                out[expert].add_(torch.mm(one.T, other))

    def scaled(self, rows: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """Return each row times its expert's row of `factors` (E, width), elementwise."""
        out = torch.empty_like(rows) if out is None else out
        for expert, first, _, end in self.segments:
            torch.mul(rows[first:end], factors[expert], out=out[first:end])
        return out

    def add_sums(self, out: Tensor, rows: Tensor) -> None:
        """Add to `out` (E, width) the sum of the rows of each expert: `out[e] += sum`."""
        for expert, first, _, end in self.segments:
            out[expert].add_(rows[first:end].sum(dim=0, dtype=out.dtype))

    def zero_(self, rows: Tensor) -> Tensor:
        """Return `rows` (rows, F) with the dropped elements zero, in place."""
        if self.dropped is None:
            return rows
        if self.dropped.dim() == 2:
            return rows.mul_(self.dropped)
        rows.view(-1).index_fill_(0, self.dropped, 0.0)
        return rows

    def add_kept_product(self, out: Tensor, rows: Tensor, matrices: Tensor) -> None:
        """Add the product to the elements of `out` (rows, F) that dropout keeps; see
        `add_product`."""
        if self.dropped is None:
            self.add_product(out, rows, matrices)
        elif self.dropped.dim() == 2:
            out += self.zero_(self.multiply(rows, matrices))
        else:
            # Put back what is dropped, a twentieth: quicker than to add a second matrix.
            flat = out.view(-1)
            before = flat.index_select(0, self.dropped)
            self.add_product(out, rows, matrices)
            flat.index_copy_(0, self.dropped, before)


@dataclass(frozen=True, slots=True)
class Rows:
    """The filled (token, slot) pairs of one block, sorted by expert.

    pairs (P,): their numbers `token K + slot`, ascending; counts (tokens,): how many a token has;
    position (P,): where a pair's row is; shares (P,): the pairs' weights. Of each row: order
    (rows,), of which of the pairs it is; tokens (rows,), of which token; weights (rows, 1). Rows
    that fill up a segment repeat one of its tokens with weight 0.
    """

    pairs: Tensor
    counts: Tensor
    position: Tensor
    shares: Tensor
    order: Tensor
    tokens: Tensor
    weights: Tensor
    segments: list[Segment]

    def combine(self, rows: Tensor, *, weighted: bool = False) -> Tensor:
        """Sum over the slots of each token, with or without their weights: (tokens, width)."""
        return sum_by_token(rows, self.position, self.counts, self.shares if weighted else None)

    def pieces(self, width: int, mask: DropMask | None) -> Iterator[Piece]:
        """Yield all rows in pieces; width: F; mask: of the block's hidden states, (tokens, F)."""
        most = max(PIECE_ROWS, PIECE_ELEMENTS // width // ROUND_ROWS * ROUND_ROWS)
        cuts: list[list[Segment]] = []
        size = most
        for expert, first, filled, end in self.segments:
            while first < end:
                if size >= most or size + end - first > most + most // 2:
                    cuts.append([])
                    size = 0
                stop = end if size + end - first <= most + most // 2 else first + most
                cuts[-1].append((expert, first, max(first, min(filled, stop)), stop))
                size += stop - first
                first = stop
        dropped = _Dropped(mask)
        for own in cuts:
            start, end = own[0][1], own[-1][3]
            segments = [(e, s - start, f - start, z - start) for e, s, f, z in own]
            pairs, tokens, weights = (v[start:end] for v in (self.order, self.tokens, self.weights))
            yield Piece(slice(start, end), pairs, tokens, weights, segments, dropped.of(tokens))


class _Dropped:
    """`Piece.dropped`, by a mask of the block's hidden states, (tokens, F)."""

    def __init__(self, mask: DropMask | None) -> None:
        self.kept = self.columns = None
        if mask is None:
            return
        self.width = mask.shape[1]
        if mask.is_sparse:
            self.columns = _columns(mask.elements.long(), *mask.shape)
        if self.columns is None:
            self.kept = mask.kept()

    def of(self, tokens: Tensor) -> Tensor | None:
        """Return which elements of some rows are dropped. tokens: (rows,), the token of each."""
        if self.kept is not None:
            return self.kept.index_select(0, tokens)
        if self.columns is None:
            return None
        firsts = torch.arange(0, len(tokens) * self.width, self.width)
        return self.columns.index_select(0, tokens).add_(firsts.unsqueeze(1)).view(-1)


def _columns(elements: Tensor, tokens: int, width: int) -> Tensor | None:
    """Return the columns of each token's dropped elements, (tokens, most of a token), the last one
    repeated where there are fewer; None if a token has none. elements: their flat numbers."""
    firsts = torch.arange(0, (tokens + 1) * width, width)
    limits = torch.searchsorted(elements, firsts)
    counts = limits.diff()
    fewest, most = (int(count) for count in counts.aminmax())
    if fewest == 0:
        return None
    found = torch.minimum(limits[:-1, None] + torch.arange(most), limits[1:, None] - 1)
    return elements.index_select(0, found.view(-1)).view(found.shape).sub_(firsts[:-1, None])


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
    ends = rounded.cumsum(0)
    starts = ends - rounded
    limits = zip(*(each.tolist() for each in (starts, starts + numbers, ends)), strict=True)
    segments = [(e, s, f, z) for e, (s, f, z) in enumerate(limits) if s < z]
    tokens = torch.div(pairs[chosen], top_k, rounding_mode="floor")
    weights = row_weights.unsqueeze(1)
    return Rows(pairs, filled.sum(dim=1), position, shares, chosen, tokens, weights, segments)


def blocks(tokens: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Yield token ranges (first, end) of equal size whose pairs number about `BLOCK_ROWS` at
    most."""
    count = max(1, -(-tokens * top_k // BLOCK_ROWS))
    size = max(1, -(-tokens // count))
    for start in range(0, max(tokens, 1), size):
        yield start, min(start + size, tokens)
