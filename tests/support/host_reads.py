"""Counts what the host asks of tensors, for which it would wait for a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
)


@contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """By method, within this context. One method that calls another counts once."""
    found: Counter[str] = Counter()
    inside = [False]

    def counted(name: str):
        own = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            if inside[0]:
                return own(self, *args, **kwargs)
            inside[0] = True
            try:
                found[name] += 1
                return own(self, *args, **kwargs)
            finally:
                inside[0] = False

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, counted(name))
        yield found
