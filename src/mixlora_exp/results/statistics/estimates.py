"""Accuracies and their differences with intervals and p-values, as fractions."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from mixlora_exp.results.statistics.parts import TaskMean, interval, p_value, seeds_of


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and items with its interval over both; see `parts.interval`. With one seed
    the interval is over items alone and says nothing about others."""

    value: float
    low: float
    high: float
    seeds: int
    items: int


@dataclass(frozen=True, slots=True)
class Comparison(Estimate):
    """The difference of two methods on the same items and seeds; `p`: two-sided, not corrected,
    from the same interval."""

    p: float


def estimate(*parts: TaskMean) -> Estimate:
    """Return one cell, or the unweighted average over the cells of several tasks, each over the
    seeds that it has."""
    low, high = interval(parts)
    middle = mean(part.value for part in parts)
    items = sum(part.items for part in parts)
    return Estimate(middle, max(0.0, low), min(1.0, high), seeds_of(parts), items)


def compare(*parts: TaskMean) -> Comparison:
    """Return a difference, or the unweighted average of those on several tasks. The interval of
    differences of accuracies ends at -1 and 1, as no such difference lies beyond."""
    low, high = interval(parts)
    limit = max(part.limit for part in parts)
    middle = mean(part.value for part in parts)
    items = sum(part.items for part in parts)
    return Comparison(
        middle, max(-limit, low), min(limit, high), seeds_of(parts), items, p_value(parts)
    )
