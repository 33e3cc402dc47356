"""What a protocol returns, and the statistics over its items."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixlora_exp.errors import UserError
from mixlora_exp.tasks.base import Item

__all__ = ["ItemScore", "TaskScore", "summarize"]


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One scored item. `scores` are per option what the prediction is the arg-max of (logits or
    log-likelihoods); `gold_log_likelihood` is in nats; `prediction_normalized` is the choice by
    log-likelihood per character, where the protocol has one. A protocol that reads a generated
    `text` has neither scores nor likelihood, and the prediction None where it found no answer."""

    id: str
    answer: int
    prediction: int | None
    scores: list[float] = field(default_factory=list)
    gold_log_likelihood: float | None = None
    prediction_normalized: int | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A task's result under a protocol; accuracies are fractions.

    `majority_class` is the accuracy of always giving the most frequent answer, `chance` that of
    guessing among each item's options. `expert_load` (layers, E): share of the (token, slot) pairs
    that each expert got while the task was scored. `shortened`: items whose context was cut.
    `tied`: items whose best score is that of several options (the first of them is the answer).
    `unparsed`: items whose generated text named no option, or whose likeliest label is none of
    theirs (`evaluation.arc_labels=nine`); they count as wrong.
    """

    task: str
    protocol: str
    n: int
    accuracy: float
    stderr: float
    accuracy_normalized: float | None
    majority_class: float
    chance: float
    gold_log_likelihood: float | None
    tied: int
    shortened: int
    unparsed: int | None = None
    expert_load: list[list[float]] | None = None
    batch_check: dict[str, Any] | None = None
    items: list[ItemScore] = field(default_factory=list, repr=False)


def summarize(
    task: str, protocol: str, items: Sequence[Item], scores: Sequence[ItemScore], **rest: Any
) -> TaskScore:
    """Accuracy with its standard error sqrt(p (1 - p) / n), beside the two baselines.

    Raises:
        UserError: a score is not a finite number, so that an arg-max of it means nothing.
    """
    for score in scores:
        numbers = (*score.scores, score.gold_log_likelihood or 0.0)
        if not all(map(math.isfinite, numbers)):
            raise UserError(
                f"the model gives item {score.id} of {task} scores that are not finite numbers; "
                "nothing was recorded. If it was trained, lower trainer.learning_rate or set "
                "trainer.max_grad_norm"
            )
    n = len(scores)
    accuracy = sum(s.prediction == s.answer for s in scores) / n
    normalized = None
    if all(s.prediction_normalized is not None for s in scores):
        normalized = sum(s.prediction_normalized == s.answer for s in scores) / n
    answers = Counter(item.labels[item.answer] for item in items)
    return TaskScore(
        task=task,
        protocol=protocol,
        n=n,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / n),
        accuracy_normalized=normalized,
        majority_class=answers.most_common(1)[0][1] / n,
        chance=sum(1 / len(item.options) for item in items) / n,
        tied=sum(s.scores.count(max(s.scores, default=0)) > 1 for s in scores),
        gold_log_likelihood=_mean([s.gold_log_likelihood for s in scores]),
        items=list(scores),
        **rest,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
