"""Pads examples to a batch with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixlora_exp.config.schema import LossOn
from mixlora_exp.data.encoding import Example

KEPT = 8


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Return left-padded `input_ids`, `attention_mask` and `position_ids`, each (rows, length).

    Left padding aligns the last positions, whose logits are needed, in the last columns. Positions
    count from each row's first non-padding token.
    """
    return pad(rows, pad_id, "left")


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: str, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Pad rows on `side`, left or right, to a length that `multiple` divides; see `pad_left`."""
    length = max(len(row) for row in rows)
    length += -length % multiple
    ids, mask = [], []
    for row in rows:
        fill = length - len(row)
        before, after = (fill, 0) if side == "left" else (0, fill)
        ids.append([pad_id] * before + list(row) + [pad_id] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
    kept = torch.tensor(mask)
    positions = (kept.cumsum(dim=-1) - 1).clamp(min=0)
    return {"input_ids": torch.tensor(ids), "attention_mask": kept, "position_ids": positions}


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads examples and sets their labels.

    `loss_on=answer`: labels are the answer's tokens, and logits are computed only for the last
    columns (`logits_to_keep`), which contain all answers. `loss_on=all`: labels are all tokens
    without padding, or with `padding` also the padding tokens, as in the official packages. Padding
    is then on the tokenizer's `padding_side`, and positions are the column numbers 0, 1, 2, ...,
    as there. (If all padding had one position, the model could not distinguish padding tokens, and
    their loss would differ.)

    `packing`: no padding. The examples follow one another in a single row, (1, tokens), each with
    positions from 0. `unpack` (examples, longest) int64 then has the columns of each example's
    tokens; behind its end it repeats column 0.

    `multiple`: lengths are padded to a multiple of it, and the number of columns with logits to one
    of `KEPT`, so that batches have few shapes. `type1`: with it a batch has `task_types`
    (rows,), 1 for examples of these tasks and 0 for the others.

    `example` (rows,): number of each example within the optimizer step, across micro-batches and
    processes; `first`: the number of this batch's first example.
    """

    pad_id: int
    loss_on: LossOn
    padding: bool = False
    padding_side: str = "left"
    multiple: int = 1
    type1: Sequence[str] = ()
    packing: bool = False

    def __call__(self, examples: Sequence[Example], first: int = 0) -> dict[str, Any]:
        """Make a batch of examples; `first`: number of the first one within the optimizer step."""
        numbers = torch.arange(first, first + len(examples))
        made = self._packed(examples) if self.packing else self._padded(examples)
        batch = {**made, "example": numbers}
        if self.type1:
            batch["task_types"] = torch.tensor([int(e.task in self.type1) for e in examples])
        return batch

    def _padded(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.padding:
            rows = [e.input_ids for e in examples]
            batch = pad(rows, self.pad_id, self.padding_side, self.multiple)
            ids = batch["input_ids"]
            columns = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
            return {**batch, "position_ids": columns, "labels": ids.clone()}
        tokens = [e.input_ids for e in examples]
        batch: dict[str, Any] = pad(tokens, self.pad_id, "left", self.multiple)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        if self.loss_on is LossOn.all:
            # Only padding precedes a row's first token, so it has no prediction.
            starts = (mask.cumsum(dim=-1) == 1) & (mask == 1)
            return {**batch, "labels": labels.masked_fill(starts, -100)}
        lengths = torch.tensor([e.answer_length for e in examples])
        columns = torch.arange(ids.shape[1], 0, -1)
        labels = labels.masked_fill(columns > lengths.unsqueeze(1), -100)
        # One column more than the longest answer: the token before it predicts its first token.
        keep = int(lengths.max()) + 1
        if self.multiple > 1:
            keep = min(keep + -keep % KEPT, ids.shape[1])
        # Column indices instead of a count: a slice is not contiguous, and multiplying by one makes
        # a CPU copy the whole vocabulary matrix.
        kept = torch.arange(ids.shape[1] - keep, ids.shape[1])
        return {**batch, "labels": labels[:, -keep:], "logits_to_keep": kept}

    def _packed(self, examples: Sequence[Example]) -> dict[str, Any]:
        ids = torch.tensor([token for e in examples for token in e.input_ids])
        lengths = torch.tensor([len(e.input_ids) for e in examples])
        starts = lengths.cumsum(0) - lengths
        positions = torch.arange(len(ids)) - starts.repeat_interleave(lengths)
        columns = torch.arange(int(lengths.max()))
        real = columns < lengths.unsqueeze(1)
        unpack = (starts.unsqueeze(1) + columns).masked_fill(~real, 0)
        # What precedes an example's first token is another example.
        labels = ids.masked_fill(positions == 0, -100)
        batch: dict[str, Any] = {
            "input_ids": ids.unsqueeze(0),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "position_ids": positions.unsqueeze(0),
            "unpack": unpack,
        }
        if self.loss_on is LossOn.all:
            return {**batch, "labels": labels.unsqueeze(0)}
        answers = lengths - torch.tensor([e.answer_length for e in examples])
        inside = positions - answers.repeat_interleave(lengths)
        # And the token before each answer, which predicts its first token.
        kept = (inside >= -1).nonzero().flatten()
        labels = labels.masked_fill(inside < 0, -100)[kept]
        return {**batch, "labels": labels.unsqueeze(0), "logits_to_keep": kept}
