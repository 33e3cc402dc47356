"""The batch of a training step, random tokens with labels as a training run has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.bench.options import StepOptions
from mixlora_exp.config.choices import LossOn
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One micro-batch of full-length examples, on the device.

    inputs: what a model takes. items: label tokens of the step, which the loss is divided by.
    all_labels: (batch, length), the labels with every position's logits computed. example,
    position: (batch x length,), of which example a row is and where in it, for dropout. dtype: of
    the frozen weights, which decides about autocast.
    """

    inputs: dict[str, Tensor]
    items: Tensor
    all_labels: Tensor
    example: Tensor
    position: Tensor
    dtype: torch.dtype

    @property
    def ids(self) -> Tensor:
        """Token ids (batch, length)."""
        return self.inputs["input_ids"]

    def given_to(self, *, all_logits: bool) -> dict[str, Any]:
        """Return the arguments of a training forward pass; `all_logits`: as a collator gives them
        that knows nothing of `logits_to_keep`."""
        given: dict[str, Any] = {**self.inputs, "num_items_in_batch": self.items}
        if all_logits:
            given.pop("logits_to_keep", None)
            given["labels"] = self.all_labels
        return given


def step_batch(
    *,
    vocabulary: int,
    batch: int,
    length: int,
    loss_on: LossOn,
    answer: int = 8,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> StepBatch:
    """Return `batch` random examples of `length` tokens, the last `answer` of which are the
    answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    answer = min(answer, length - 1)
    examples = [Example(row.tolist(), answer, "random") for row in ids]
    made = {k: v.to(device) for k, v in Collator(0, loss_on)(examples).items()}
    example = made.pop("example").repeat_interleave(length)
    position = made["position_ids"].flatten()
    labels = torch.full_like(made["input_ids"], -100)
    labels[:, -made["labels"].shape[1] :] = made["labels"]
    items = (labels[:, 1:] != -100).sum()
    return StepBatch(made, items, labels, example, position, dtype)


def batch_of(config: StepOptions, vocabulary: int, device: str) -> StepBatch:
    """Return the batch that a benchmark of steps needs, by its settings."""
    return step_batch(
        vocabulary=vocabulary,
        batch=config.batch,
        length=config.length,
        loss_on=config.loss_on,
        answer=config.answer,
        dtype=getattr(torch, config.dtype),
        device=device,
        seed=config.seed,
    )
