"""From examples to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixlora_exp.config.schema import LossOn
from mixlora_exp.data.encoding import Example

__all__ = ["Collator", "pad_left"]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `position_ids` (rows, length), padded in front.

    Padding stands in front so that the last positions, whose logits are needed, are the last
    columns; positions count from each row's first real token.
    """
    return pad(rows, pad_id, "left")


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """The same with padding on `side`, left or right."""
    length = max(len(row) for row in rows)
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
    """Pads examples and sets their labels; padding never counts unless `padding` asks for it.

    `loss_on=answer`: the loss is on the answer's tokens, and logits are computed for the last
    columns only (`logits_to_keep`), which hold all answers. `loss_on=all`: on every real token,
    and with `padding` on padding tokens as well, as in the official packages: padding then stands
    on `padding_side`, the tokenizer's, and positions count 0, 1, 2, ... through it from the left
    edge, as they do there. (With one position for all padding of a row the model cannot tell its
    padding tokens apart, and their loss is another.)

    `example` (rows,) numbers the examples of an optimizer step, over its micro-batches and all
    processes; `first` is the number of this batch's first one.
    """

    pad_id: int
    loss_on: LossOn
    padding: bool = False
    padding_side: str = "left"

    def __call__(self, examples: Sequence[Example], first: int = 0) -> dict[str, Any]:
        numbers = torch.arange(first, first + len(examples))
        return {**self._padded(examples), "example": numbers}

    def _padded(self, examples: Sequence[Example]) -> dict[str, Any]:
        if self.padding:
            batch = pad([e.input_ids for e in examples], self.pad_id, self.padding_side)
            ids = batch["input_ids"]
            columns = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
            return {**batch, "position_ids": columns, "labels": ids.clone()}
        batch: dict[str, Any] = pad_left([e.input_ids for e in examples], self.pad_id)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        if self.loss_on is LossOn.all:
            # Nothing real comes before a row's first token, so nothing predicts it.
            starts = (mask.cumsum(dim=-1) == 1) & (mask == 1)
            return {**batch, "labels": labels.masked_fill(starts, -100)}
        lengths = torch.tensor([e.answer_length for e in examples])
        columns = torch.arange(ids.shape[1], 0, -1)
        labels = labels.masked_fill(columns > lengths.unsqueeze(1), -100)
        # One column more than the longest answer: the token before it predicts its first.
        keep = int(lengths.max()) + 1
        # Column numbers, not a count: a slice would not be contiguous, and a CPU copies the whole
        # vocabulary matrix to multiply by one.
        kept = torch.arange(ids.shape[1] - keep, ids.shape[1])
        return {**batch, "labels": labels[:, -keep:], "logits_to_keep": kept}
