"""Intervals and comparisons of accuracies; everything in fractions, level 95 %."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from scipy import stats

__all__ = ["Comparison", "Estimate", "compare", "estimate", "mcnemar"]

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its interval. `by` says what the interval is about: `seeds` (what
    another seed would give: Student's t over the seeds' values) or, with one seed, `items` (what
    other questions of the kind would give)."""

    value: float
    low: float
    high: float
    seeds: int
    items: int
    by: str


def estimate(accuracies: Sequence[float], items: int) -> Estimate:
    """Mean accuracy of one cell. One seed: Wilson's interval of a proportion over `items`."""
    n = len(accuracies)
    if n > 1:
        middle = mean(accuracies)
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * stdev(accuracies) / math.sqrt(n)
        return Estimate(middle, middle - half, middle + half, n, items, "seeds")
    right = round(accuracies[0] * items)
    interval = stats.binomtest(right, items).proportion_ci(LEVEL, method="wilson")
    return Estimate(accuracies[0], interval.low, interval.high, 1, items, "items")


def estimate_average(cells: Sequence[Sequence[float]], items: Sequence[int]) -> Estimate:
    """The unweighted average over tasks. `cells`: per task, the accuracy of each seed, the same
    seeds in the same order. One seed: normal interval, tasks taken as independent."""
    per_seed = [mean(values) for values in zip(*cells, strict=True)]
    if len(per_seed) > 1:
        return estimate(per_seed, sum(items))
    variance = sum(p * (1 - p) / n for (p,), n in zip(cells, items, strict=True)) / len(cells) ** 2
    half = stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt(variance)
    return Estimate(per_seed[0], per_seed[0] - half, per_seed[0] + half, 1, sum(items), "items")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Difference of two methods on the same items, averaged over the seeds that both have.
    `low`, `high`: paired bootstrap over items (and seeds, where there are several); `p`: exact
    McNemar test, one seed only."""

    difference: float
    low: float
    high: float
    seeds: int
    items: int
    p: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: items that one method alone got right are a fair coin's throws."""
    trials = only_first + only_second
    return 1.0 if trials == 0 else float(stats.binomtest(only_first, trials).pvalue)


def compare(
    first: Mapping[int, Mapping[str, bool]], second: Mapping[int, Mapping[str, bool]]
) -> Comparison | None:
    """`first` minus `second`; each maps seed -> item -> right or wrong. None where they share no
    seed. The same input gives the same interval: the bootstrap draws from a fixed seed.

    Raises:
        ValueError: the two were scored on other items.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    items = sorted(first[seeds[0]])
    for side in (first, second):
        for seed in seeds:
            if sorted(side[seed]) != items:
                raise ValueError("the methods were scored on different items")
    a, b = (np.array([[float(s[k][i]) for i in items] for k in seeds]) for s in (first, second))
    difference = a - b
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = difference[generator.integers(len(seeds), size=len(seeds))]
        drawn.append(chosen.mean(axis=0)[generator.integers(len(items), size=len(items))].mean())
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = None
    if len(seeds) == 1:
        p = mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    return Comparison(float(difference.mean()), float(low), float(high), len(seeds), len(items), p)
