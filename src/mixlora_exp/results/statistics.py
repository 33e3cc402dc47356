"""Confidence intervals and comparisons of accuracies, as fractions, at the 95 % level."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES, PORTION = 2000, 100


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its interval: over items or over seeds (Student's t), whichever is
    wider; `by` is "items" or "seeds". With one seed, the interval does not cover other seeds."""

    value: float
    low: float
    high: float
    seeds: int
    items: int
    by: str


def _wider(value: float, items: tuple[float, float], seeds: Sequence[float], n: int) -> Estimate:
    low, high = items
    if len(seeds) > 1:
        half = _half_width(seeds)
        if 2 * half > high - low:
            return Estimate(value, value - half, value + half, len(seeds), n, "seeds")
    return Estimate(value, low, high, len(seeds), n, "items")


def _half_width(values: Sequence[float]) -> float:
    """Half the width of Student's t interval of the mean."""
    n = len(values)
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)


def estimate(accuracies: Sequence[float], items: int) -> Estimate:
    """Mean accuracy of one cell, with one value per seed over the same number of `items`. Interval
    over items: Wilson's."""
    middle = mean(accuracies)
    interval = stats.binomtest(round(middle * items), items).proportion_ci(LEVEL, method="wilson")
    return _wider(middle, (interval.low, interval.high), accuracies, items)


def estimate_average(cells: Sequence[Sequence[float]], items: Sequence[int]) -> Estimate:
    """The unweighted average over tasks. `cells`: per task, the accuracy of each seed, in the same
    order of seeds. Interval over items: normal, with independent tasks."""
    per_seed = [mean(values) for values in zip(*cells, strict=True)]
    means = [mean(values) for values in cells]
    variance = sum(p * (1 - p) / n for p, n in zip(means, items, strict=True)) / len(cells) ** 2
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance)
    middle = mean(per_seed)
    return _wider(middle, (middle - half, middle + half), per_seed, sum(items))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Difference of two methods on the same items, averaged over their common seeds. `low`, `high`:
    paired bootstrap over items, with several seeds widened to Student's t interval of the seeds'
    differences; `p`: exact McNemar test, only with one seed."""

    difference: float
    low: float
    high: float
    seeds: int
    items: int
    p: float | None

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test, from the numbers of items that only one method
    answers correctly."""
    trials = only_first + only_second
    return 1.0 if trials == 0 else float(stats.binomtest(only_first, trials).pvalue)


Side = Mapping[int, Mapping[str, float]]
"""Seed -> item -> right or wrong, or another figure."""


def _differences(first: Side, second: Side) -> np.ndarray | None:
    """Differences (common seeds, items); None without a common seed."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    items = sorted(first[seeds[0]])
    for side in (first, second):
        for seed in seeds:
            if sorted(side[seed]) != items:
                raise ValueError("they were scored on different items")
    a, b = (np.array([[float(s[k][i]) for i in items] for k in seeds]) for s in (first, second))
    return a - b


def compare(first: Side, second: Side) -> Comparison | None:
    """Compare `first` minus `second`; None without a common seed. Deterministic: the bootstrap has
    a fixed seed.

    Raises:
        ValueError: the two were scored on different items.
    """
    difference = _differences(first, second)
    if difference is None:
        return None
    found = _compared([difference])
    if found.seeds > 1:
        return found
    p = mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    return dataclasses.replace(found, p=p)


def compare_average(pairs: Sequence[tuple[Side, Side]]) -> Comparison | None:
    """Compare the average over tasks of `first` minus `second`, one pair per task; the bootstrap
    resamples items within each task. None if a task has no common seed, or the tasks have different
    common seeds."""
    found = [_differences(*pair) for pair in pairs]
    seeds = {tuple(sorted(first.keys() & second.keys())) for first, second in pairs}
    if not pairs or len(seeds) != 1 or any(one is None for one in found):
        return None
    return _compared(found)


def _compared(tasks: Sequence[np.ndarray]) -> Comparison:
    """tasks: per task, (seeds, items); see `Comparison` for the interval."""
    generator = np.random.default_rng(0)
    drawn = np.zeros(RESAMPLES)
    for task in tasks:
        by_item = task.mean(axis=0)
        n = len(by_item)
        # In portions, because all draws of a large test set would take hundreds of MB.
        for start in range(0, RESAMPLES, PORTION):
            chosen = generator.integers(n, size=(PORTION, n))
            drawn[start : start + PORTION] += by_item[chosen].mean(axis=1)
    low, high = map(float, np.quantile(drawn / len(tasks), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    by_seed = np.mean([task.mean(axis=1) for task in tasks], axis=0)
    middle = float(by_seed.mean())
    if len(by_seed) > 1:
        # Seeds may vary more than items: the wider bounds must exclude zero.
        half = _half_width(by_seed.tolist())
        low, high = min(low, middle - half), max(high, middle + half)
    return Comparison(middle, low, high, len(by_seed), sum(t.shape[1] for t in tasks), None)
