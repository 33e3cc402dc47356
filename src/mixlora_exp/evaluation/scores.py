"""Results of a protocol per item and per task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixlora_exp.errors import UserError
from mixlora_exp.tasks import TASKS
from mixlora_exp.tasks.base import Item
from mixlora_exp.tasks.clusters import clusters


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One scored item.

    `scores`: logits or log-likelihoods per option, whose arg-max is the prediction.
    `gold_log_likelihood`: in nats. `prediction_normalized`: the choice by log-likelihood per
    character, if the protocol has one. A protocol that parses a generated `text` has neither scores
    nor likelihood, and its prediction is None if it found no answer.
    """

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

    `majority_class`: accuracy of always giving the most frequent answer; `chance`: of guessing
    among each item's options. `expert_load` (layers, E): share of the (token, slot) pairs routed to
    each expert while the task was scored. `shortened`: items whose context was truncated. `tied`:
    items with several best options (the first is the prediction). `unparsed`: items whose generated
    text names no option, or whose most likely label is not theirs (`evaluation.arc_labels=nine`);
    they count as wrong. `clusters`: item -> first item of its cluster, for items that depend on
    others (see `tasks.clusters`); empty for a task of the user's own.
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
    clusters: dict[str, str] = field(default_factory=dict)
    items: list[ItemScore] = field(default_factory=list, repr=False)


def summarize(
    task: str, protocol: str, items: Sequence[Item], scores: Sequence[ItemScore], **rest: Any
) -> TaskScore:
    """Accuracy p with its standard error sqrt(p (1 - p) / n), and the two baselines.

    Raises:
        UserError: a score is not finite, so that its arg-max is meaningless.
    """
    for score in scores:
        numbers = (*score.scores, score.gold_log_likelihood or 0.0)
        if not all(map(math.isfinite, numbers)):
            raise UserError(
                f"the model's scores for item {score.id} of {task} are not finite; nothing was "
                "recorded. If the adapter was trained here, lower trainer.learning_rate or set "
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
        clusters=clusters(items) if task in TASKS else {},
        items=list(scores),
        **rest,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
