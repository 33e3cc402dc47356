"""Counts what the host asks of tensors, for which it would wait for a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
"""Methods of a tensor; on a CPU some of them dispatch no operator."""
OPERATORS = (
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "equal", "is_nonzero", "masked_select",
    "_unique", "_unique2", "unique_consecutive", "unique_dim", "bincount", "allclose", "histc",
)  # fmt: skip
"""Operators whose result, or the size of it, the host has to know."""


class _Operators(TorchDispatchMode):
    """Counts operators that wait, whoever calls them: indexing with a mask is one."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found, self.muted = found, False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Else torch.compile refuses to trace."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in args[1]
        )
        if not self.muted and (name in OPERATORS or by_mask):
            self.found[f"{name} by a mask" if by_mask else name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """By method or operator, within this context. One method that calls another counts once."""
    found: Counter[str] = Counter()
    mode = _Operators(found)

    def counted(name: str):
        own = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            if mode.muted:
                return own(self, *args, **kwargs)
            mode.muted = True
            try:
                found[name] += 1
                return own(self, *args, **kwargs)
            finally:
                mode.muted = False

        return method

    with pytest.MonkeyPatch.context() as patch, mode:
        for name in READS:
            patch.setattr(torch.Tensor, name, counted(name))
        yield found
