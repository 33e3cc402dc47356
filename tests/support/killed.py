"""Stands in for a kill in the middle of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mixlora_exp.data.collator import Collator


class Killed(BaseException):
    """Nothing after it is carried out."""


@contextmanager
def killed_after(examples: int) -> Iterator[None]:
    """What runs within is killed when it collates more than `examples`; fails if it never does."""
    real, left = Collator.__call__, [examples]

    def collate(self, rows, first=0):
        left[0] -= len(rows)
        if left[0] < 0:
            raise Killed
        return real(self, rows, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collator, "__call__", collate)
        with pytest.raises(Killed):
            yield
