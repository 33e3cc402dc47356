"""What counts as a spike of a loss or a gradient norm."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW, LEAST, FACTOR = 20, 4, 1.5


def spikes(values: Sequence[float]) -> list[int]:
    """Indices of values that stand out from those before them.

    A spike is more than one and a half times the largest of the twenty values before it: in a
    mixture of tasks a batch of the hardest one is no spike. At the beginning it is held against as
    many as there are, if they are four: training breaks in its first steps if its rate is too high.
    """
    return [
        i
        for i in range(LEAST, len(values))
        if values[i] > FACTOR * max(values[max(0, i - WINDOW) : i])
    ]
