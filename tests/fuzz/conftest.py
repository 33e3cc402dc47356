"""How many odd inputs of each kind the generators draw: a sample; with SOAK_FUZZ=1 all of them,
with SOAK_FUZZ=N N times as many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from random import Random

import pytest

TIMES = int(os.environ.get("SOAK_FUZZ", "0"))


@pytest.fixture
def draws(record_property: Callable[[str, object], None]) -> Callable[..., Iterator[Random]]:
    """Generators with the seeds 0, 1, ...: `sample` of them in the quick tests, else `whole`."""

    def drawn(kind: str, sample: int, whole: int) -> Iterator[Random]:
        count = whole * TIMES or sample
        record_property(kind, count)
        for seed in range(count):
            yield Random(f"{kind} {seed}")

    return drawn
