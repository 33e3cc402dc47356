"""SIGTERM: what a scheduler sends before it takes a machine away. A run saves and goes.

Where nothing is under way that a checkpoint would hold, the process ends at once; in training it
ends after the step that is being computed, with a checkpoint. Its exit code asks for a new start.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["REQUEUE", "Terminated", "deferred", "install", "requested"]

REQUEUE = 75
"""Exit code after SIGTERM (EX_TEMPFAIL): start the same command again and it goes on."""


class Terminated(BaseException):
    """The process was asked to end; what was done is kept."""


class _State:
    def __init__(self) -> None:
        self.requested = threading.Event()
        self.depth = 0


_STATE = _State()


def requested() -> bool:
    """Whether the process was asked to end while that was deferred."""
    return _STATE.requested.is_set()


def _handle(number: int, frame: FrameType | None) -> None:
    if _STATE.depth:
        _STATE.requested.set()
    else:
        raise Terminated


def install() -> None:
    """Handle SIGTERM in this process; only its main thread can."""
    if threading.current_thread() is threading.main_thread():
        _STATE.requested.clear()
        signal.signal(signal.SIGTERM, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Within this context a request is only noted, for `requested` to tell; at its end it takes
    effect.

    Raises:
        Terminated: at the end, if there was a request.
    """
    _STATE.depth += 1
    try:
        yield
    finally:
        _STATE.depth -= 1
    if not _STATE.depth and requested():
        _STATE.requested.clear()
        raise Terminated
