"""Detects spikes of a loss or a gradient norm."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW, LEAST, FACTOR = 20, 4, 1.5


def spikes(values: Sequence[float]) -> list[int]:
    """Return indices of values larger than 1.5 times the maximum of the 20 values before them.

    The maximum keeps a batch of the hardest task in a mixture from counting as a spike. At the
    beginning at least 4 earlier values suffice, because training with too high a learning rate
    diverges in its first steps.
    """
    return [
        i
        for i in range(LEAST, len(values))
        if values[i] > FACTOR * max(values[max(0, i - WINDOW) : i])
    ]
