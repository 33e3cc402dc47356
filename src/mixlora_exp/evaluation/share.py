"""The part of the batches that each of several processes scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True, slots=True)
class Share:
    """Batches are dealt to `count` processes, of which this one has the number `index`, in turn.

    `gathered` returns the values that all processes gave it, in their order; they must call it at
    the same time. Batches are those of one process, so that a score does not depend on `count`.
    """

    index: int = 0
    count: int = 1
    gathered: Callable[[Any], list[Any]] = _alone

    def results(
        self, batches: Sequence[list[int]], work: Callable[[list[int]], Sequence[Result]]
    ) -> list[Result]:
        """Return the results of `work` for items of each batch (their indices), by index; in every
        process those of all."""
        own = {
            i: result
            for batch in batches[self.index :: self.count]
            for i, result in zip(batch, work(batch), strict=True)
        }
        found = {i: result for part in self.gathered(own) for i, result in part.items()}
        return [found[i] for i in range(len(found))]
