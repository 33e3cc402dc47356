"""The forest plot as the page draws it: places on a common axis, in percent of its width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixlora_exp.results.tables.parts import Entry

TICK = 5
"""Points between two ticks."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """A paired difference of the forest plot, in points."""

    label: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class ForestLine:
    """A difference: its label, its figures as text, and the places of the bar and the mark."""

    label: str
    shown: str
    left: float
    width: float
    at: float
    one_seed: bool


@dataclass(frozen=True, slots=True)
class Forest:
    """Lines under one another, and the ticks of their axis: (points, place)."""

    lines: Sequence[ForestLine]
    ticks: Sequence[tuple[str, float]]
    zero: float


def forest(contrasts: Sequence[Contrast]) -> Forest | None:
    """Return the plot of all contrasts that have an interval; None without one."""
    known = [
        (contrast.label, entry, entry.value, entry.low, entry.high)
        for contrast in contrasts
        if (entry := contrast.entry).low is not None
        and entry.high is not None
        and entry.value is not None
    ]
    if not known:
        return None
    lowest = min(0.0, *(low for *_, low, _ in known)) - 1
    highest = max(0.0, *(high for *_, high in known)) + 1

    def place(points: float) -> float:
        return round(100 * (points - lowest) / (highest - lowest), 2)

    lines = [
        ForestLine(
            label, entry.show(), place(low), round(place(high) - place(low), 2), place(value),
            entry.seeds == 1,
        )
        for label, entry, value, low, high in known
    ]  # fmt: skip
    first, last = -int(-lowest // TICK), int(highest // TICK)
    ticks = [(f"{TICK * n:+d}" if n else "0", place(TICK * n)) for n in range(first, last + 1)]
    return Forest(lines, ticks, place(0))
