"""Triton launches seen by an observer: the kernel, its arguments, and a call that launches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.jit import KernelInterface

Launch = Callable[[str, dict[str, Any], Callable[[], Any]], Any]
"""Given a kernel's name, its arguments by name, and what carries it out."""


@contextmanager
def launched_by(launch: Launch) -> Iterator[None]:
    """Within this context `kernel[grid](...)` calls `launch(name, arguments, run)` instead, for
    every kernel of the process, compiled or interpreted."""
    stock = KernelInterface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
        def start(*args: Any, **kwargs: Any) -> Any:
            inner = kernel
            # Around it may be an autotuner or a heuristic.
            while hasattr(inner, "fn"):
                inner = inner.fn
            arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            return launch(inner.__name__, arguments, lambda: stock(kernel, grid)(*args, **kwargs))

        return start

    KernelInterface.__getitem__ = getitem
    try:
        yield
    finally:
        KernelInterface.__getitem__ = stock
