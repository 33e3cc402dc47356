"""Means over items and seeds with their two sources of error, and averages of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from mixlora_exp.records.wilson import Z, wilson
from mixlora_exp.results.statistics.intervals import Bounds, student, tango

BY_ITEM = Mapping[str, float]
"""Item -> right (1.0) or wrong (0.0), or another figure."""
Groups = Mapping[str, str]
"""Item -> name of the cluster of items that it belongs to; items that are left out stand alone."""


@dataclass(frozen=True, slots=True)
class TaskMean:
    """A mean over the items of one task and over seeds.

    `by_item(z)`: its interval over items alone, for the seeds that were run. `by_seed`: the mean of
    each seed; `items`: number of items; `limit`: what a difference of such means can at most be.
    """

    value: float
    by_item: Callable[[float], Bounds]
    by_seed: Mapping[int, float]
    items: int
    limit: float = math.inf


def variance_of_mean(values: np.ndarray, groups: Sequence[str]) -> float:
    """Return the variance of the mean of `values` (items,), whose clusters are independent of one
    another."""
    _, number = np.unique(groups, return_inverse=True)
    sums = np.bincount(number, weights=values - values.mean())
    return float((sums**2).sum()) / len(values) ** 2


def _effective(shared: float, values: np.ndarray, groups: Sequence[str], seeds: int) -> float:
    """Return the number of independent items which would give a mean its variance over items.

    shared: variance of one item of one seed. The number is at most that of all answers, and that of
    the clusters where nothing varies.
    """
    observed = variance_of_mean(values, groups)
    # Rounding, where every item has the same value.
    if min(shared, observed) < 1e-12:
        return len(set(groups))
    return min(shared / observed, seeds * len(values))


def _matrix(side: Mapping[int, BY_ITEM], groups: Groups) -> tuple[np.ndarray, list[str]]:
    items = sorted(next(iter(side.values())))
    if any(sorted(values) != items for values in side.values()):
        raise ValueError("they were scored on different items")
    figures = np.array([[float(side[seed][i]) for i in items] for seed in sorted(side)])
    return figures, [groups.get(item, item) for item in items]


def _part(
    figures: np.ndarray,
    seeds: Sequence[int],
    by_item: Callable[[float], Bounds],
    limit: float = math.inf,
) -> TaskMean:
    means = figures.mean(axis=1)
    by_seed = dict(zip(seeds, map(float, means), strict=True))
    return TaskMean(float(means.mean()), by_item, by_seed, figures.shape[1], limit)


def accuracy_part(side: Mapping[int, BY_ITEM], groups: Groups) -> TaskMean:
    """Return the accuracy of one cell; seed -> item -> right or wrong. Over items: Wilson's
    interval for an effective number of items.

    Raises:
        ValueError: the seeds were scored on different items.
    """
    figures, clusters = _matrix(side, groups)
    share = float(figures.mean())
    n = _effective(share * (1 - share), figures.mean(axis=0), clusters, len(figures))
    return _part(figures, sorted(side), lambda z: wilson(share, n, z))


def difference_part(
    first: Mapping[int, BY_ITEM], second: Mapping[int, BY_ITEM], groups: Groups, *, binary: bool
) -> TaskMean | None:
    """Return `first` minus `second` over their common seeds; None without one. Over items: Tango's
    interval for an effective number of items if the figures are `binary` (right or wrong), else a
    normal one.

    Raises:
        ValueError: the two were scored on different items.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    (a, clusters), (b, others) = (
        _matrix({seed: side[seed] for seed in seeds}, groups) for side in (first, second)
    )
    if clusters != others or first[seeds[0]].keys() != second[seeds[0]].keys():
        raise ValueError("they were scored on different items")
    figures = a - b
    middle, by_item = float(figures.mean()), figures.mean(axis=0)
    if not binary:
        error = math.sqrt(variance_of_mean(by_item, clusters))
        return _part(figures, seeds, lambda z: (middle - z * error, middle + z * error))
    gained, lost = float((figures > 0).mean()), float((figures < 0).mean())
    shared = gained + lost - middle**2
    n = _effective(shared, by_item, clusters, len(seeds))
    return _part(figures, seeds, lambda z: tango(gained, lost, n, z), limit=1.0)


def _over_seeds(parts: Sequence[TaskMean], z: float) -> float:
    """Half the width over seeds (Student's t) of the average of `parts`; 0 if one has one seed."""
    count = seeds_of(parts)
    if count < 2:
        return 0.0
    if all(part.by_seed.keys() == parts[0].by_seed.keys() for part in parts):
        rows = [mean(part.by_seed[seed] for part in parts) for seed in parts[0].by_seed]
        return student(z, count) * stdev(rows) / math.sqrt(count)
    # Other seeds for each task: at most the average of the half widths.
    return mean(
        student(z, len(part.by_seed)) * stdev(part.by_seed.values()) / math.sqrt(len(part.by_seed))
        for part in parts
    )


def seeds_of(parts: Sequence[TaskMean]) -> int:
    """Return the number of seeds that each of the parts has."""
    return min(len(part.by_seed) for part in parts)


def interval(parts: Sequence[TaskMean], z: float = Z) -> Bounds:
    """Return the interval of the unweighted average of `parts`, tasks with independent items.

    The distances of the bounds over items of each part, and of the bounds over seeds, are added in
    quadrature (the method of variance estimates recovery): where either error is negligible, the
    interval is that of the other one, and in between it covers a little more than it says.
    """
    middle, seeds = mean(part.value for part in parts), _over_seeds(parts, z)
    bounds = [part.by_item(z) for part in parts]
    down = sum((part.value - low) ** 2 for part, (low, _) in zip(parts, bounds, strict=True))
    up = sum((high - part.value) ** 2 for part, (_, high) in zip(parts, bounds, strict=True))
    n = len(parts) ** 2
    return middle - math.sqrt(down / n + seeds**2), middle + math.sqrt(up / n + seeds**2)


def p_value(parts: Sequence[TaskMean]) -> float:
    """Return the two-sided p-value of an average of zero: 1 minus the level of the interval that
    ends at zero."""
    middle = mean(part.value for part in parts)
    side = 0 if middle > 0 else 1
    smallest, largest = 1e-4, 8.0
    if middle == 0 or middle * interval(parts, smallest)[side] <= 0:
        return 1.0
    if middle * interval(parts, largest)[side] > 0:
        return float(2 * norm.sf(largest))
    z = brentq(lambda z: interval(parts, z)[side], smallest, largest, xtol=1e-6)
    return float(2 * norm.sf(z))
