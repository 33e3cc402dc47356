"""Power analysis: the smallest difference between methods that a design detects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from mixlora_exp.errors import UserError
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.tasks import TASKS

DRAWS = 20_000
POWER, STEP = 0.8, 5e-4


def full_test_sets(tasks: Sequence[str]) -> dict[str, int]:
    """Task -> number of items of its test set.

    Raises:
        UserError: a task is not one of the paper's.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"the task {unknown[0]} is unknown: choose from {', '.join(TASKS)}")
    return {task: TASKS[task].sizes["test"] for task in tasks}


def _right(run: RecordedRun, task: str) -> dict[str, bool]:
    rows = run.predictions[task, "answer_text"]
    return {key: row["prediction_normalized"] == row["answer"] for key, row in rows.items()}


def discordant_share(a: RecordedRun, b: RecordedRun, task: str) -> float:
    """Return the share of the items that exactly one of two runs answers correctly (answer_text,
    length-normalised).

    Raises:
        UserError: the runs were scored on different items.
    """
    first, second = _right(a, task), _right(b, task)
    if first.keys() != second.keys():
        raise UserError(
            f"{a.name} and {b.name} were scored on different items of {task}: give runs with the "
            "same data and evaluation.limit"
        )
    return sum(first[key] != second[key] for key in first) / len(first)


def average_item_error(discordant: Mapping[str, float], items: Mapping[str, int]) -> float:
    """Standard error over items of the difference of two methods, averaged over tasks.

    discordant: by task, the share of items that exactly one of the two answers correctly. items: by
    task, the number of scored items. The variance of a task's paired difference is at most
    discordant / items; several seeds on the same items can only lower it.
    """
    variances = [discordant[task] / items[task] for task in items]
    return math.sqrt(sum(variances)) / len(items)


def seed_spread(changed: float, items: Mapping[str, int]) -> float:
    """Standard deviation between seeds of the difference of two methods, averaged over tasks.

    changed: share of items that two seeds of one method answer differently, independently per item:
    the variance of an accuracy is then changed / 2 / items, and that of a difference twice as
    large.
    """
    return math.sqrt(sum(changed / n for n in items.values())) / len(items)


def detection_rate(difference: float, item_error: float, spread: float, seeds: int) -> float:
    """Return the simulated probability that a true `difference` gives an interval that excludes
    zero.

    The interval is that of the tables: its half widths over items (normal) and over seeds
    (Student's t with `seeds - 1` degrees of freedom) are added in quadrature; with one seed, only
    over items.
    """
    draw = np.random.default_rng(0)
    shared = draw.normal(0.0, item_error, size=(DRAWS, 1))
    observed = difference + shared + draw.normal(0.0, spread, size=(DRAWS, seeds))
    middle = observed.mean(axis=1)
    half = np.full(DRAWS, stats.norm.ppf(0.975) * item_error)
    if seeds > 1:
        over_seeds = observed.std(axis=1, ddof=1) / math.sqrt(seeds)
        half = np.hypot(half, stats.t.ppf(0.975, seeds - 1) * over_seeds)
    return float((np.abs(middle) > half).mean())


def smallest_detectable(item_error: float, spread: float, seeds: int) -> float:
    """Return the smallest true difference, in steps of `STEP`, detected with probability
    `POWER`."""
    difference = STEP
    while detection_rate(difference, item_error, spread, seeds) < POWER:
        difference += STEP
    return difference
