"""Packs token rows with a common prefix into one row, so that the prefix is computed once.

A multiple-choice question is scored by the likelihood of each option after the same prompt. The
packed row is the common prefix (trunk) followed by the rest of each option (branches). A branch
attends to the trunk and itself, and its positions continue where the trunk ends, so each token has
the same inputs as in a separate row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRUNK, PADDING = 0, -1


@dataclass(frozen=True, slots=True)
class Request:
    """A row of tokens, of which the last `scored` (at least one) are scored."""

    tokens: Sequence[int]
    scored: int


@dataclass(frozen=True, slots=True)
class PackedQuestion:
    """The rows of one question, packed. `segments`: 0 for the trunk, i for the i-th branch.
    `targets`: per request, (column that predicts it, token) of each scored token."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    targets: list[list[tuple[int, int]]]


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, rows))
    for column in range(shortest):
        if any(row[column] != rows[0][column] for row in rows):
            return column
    return shortest


def pack(requests: Sequence[Request]) -> PackedQuestion:
    """Pack the rows of one question; the last token of each is only a target, never an input."""
    rows = [request.tokens[:-1] for request in requests]
    trunk = _common_length(rows)
    packed = PackedQuestion(list(rows[0][:trunk]), list(range(trunk)), [TRUNK] * trunk, [])
    for number, (row, request) in enumerate(zip(rows, requests, strict=True), start=1):
        # A token's column in the packed row: unchanged in the trunk, shifted in a branch.
        shift = len(packed.tokens) - trunk
        packed.tokens.extend(row[trunk:])
        packed.positions.extend(range(trunk, len(row)))
        packed.segments.extend([number] * (len(row) - trunk))
        first = len(row) - request.scored
        columns = [c if c < trunk else c + shift for c in range(first, len(row))]
        wanted = request.tokens[len(request.tokens) - request.scored :]
        packed.targets.append(list(zip(columns, wanted, strict=True)))
    return packed


def pad_packed(
    questions: Sequence[PackedQuestion], pad_id: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return left-padded `input_ids` and `position_ids` (rows, length), and the additive
    `attention_mask` (rows, 1, length, length) in `dtype`: 0 where a token is attended to, else the
    dtype's minimum."""
    length = max(len(q.tokens) for q in questions)

    def padded(name: str, value: int) -> Tensor:
        rows = [getattr(q, name) for q in questions]
        return torch.tensor([[value] * (length - len(row)) + row for row in rows])

    segments = padded("segments", PADDING)
    own, other = segments.unsqueeze(2), segments.unsqueeze(1)
    before = torch.ones(length, length, dtype=torch.bool).tril()
    seen = before & (other != PADDING) & ((other == TRUNK) | (own == other))
    # Padding attends to itself: a softmax over no position would be NaN.
    seen |= torch.eye(length, dtype=torch.bool) & (own == PADDING)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {
        "input_ids": padded("tokens", pad_id),
        "position_ids": padded("positions", 0),
        "attention_mask": mask.unsqueeze(1),
    }
