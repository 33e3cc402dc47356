"""Scores of tasks with two answers that a constant answer cannot raise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.stats import rankdata

from mixlora_exp.records.wilson import wilson
from mixlora_exp.results.statistics.parts import Groups, TaskMean, variance_of_mean


def area_under_curve(margins: np.ndarray, first: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the area under the ROC curve, and each item's share in its error (DeLong's
    components).

    margins: (items,), score of the first answer minus that of the second. first: (items,), whether
    the first is right. The area is the probability that a random item whose first answer is right
    has a larger margin than one whose second is, ties counted half: 0.5 for any constant answer.

    Raises:
        ValueError: only one of the two answers is ever right.
    """
    positive, negative = margins[first], margins[~first]
    if not (len(positive) and len(negative)):
        raise ValueError("only one of the two answers is ever right")
    ranks = rankdata(margins)
    above = (ranks[first] - rankdata(positive)) / len(negative)
    below = 1 - (ranks[~first] - rankdata(negative)) / len(positive)
    area = float(above.mean())
    # Scaled so that the variance of the area is that of a mean over all items.
    parts = np.empty(len(margins))
    parts[first] = (above - area) * len(margins) / len(positive)
    parts[~first] = (below - area) * len(margins) / len(negative)
    return area, parts


def area_part(seeds: Mapping[int, Mapping[str, tuple[float, bool]]], groups: Groups) -> TaskMean:
    """Return the area under the curve over seeds and items; seed -> item -> (margin, first is
    right). Over items: Wilson's interval for the number of items that gives the area its error.

    Raises:
        ValueError: only one of the two answers is ever right.
    """
    items = sorted(next(iter(seeds.values())))
    areas, errors = {}, []
    for seed, rows in sorted(seeds.items()):
        pairs = np.array([rows[item] for item in items])
        areas[seed], parts = area_under_curve(pairs[:, 0], pairs[:, 1].astype(bool))
        errors.append(parts)
    area = float(np.mean(list(areas.values())))
    variance = variance_of_mean(np.mean(errors, axis=0), [groups.get(i, i) for i in items])
    first = sum(bool(right) for _, right in rows.values())
    fewest = min(first, len(items) - first)
    n = area * (1 - area) / variance if min(variance, area * (1 - area)) > 1e-12 else fewest
    return TaskMean(area, lambda z: wilson(area, n, z), areas, len(items))


def area_error(rows: Mapping[str, tuple[float, bool]], groups: Groups) -> tuple[float, float]:
    """Return the area under the curve of one run and its standard error over items; item ->
    (margin, first is right).

    Raises:
        ValueError: only one of the two answers is ever right.
    """
    items = sorted(rows)
    pairs = np.array([rows[item] for item in items])
    area, parts = area_under_curve(pairs[:, 0], pairs[:, 1].astype(bool))
    return area, float(variance_of_mean(parts, [groups.get(i, i) for i in items]) ** 0.5)
