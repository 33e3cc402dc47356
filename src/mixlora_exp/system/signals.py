"""SIGTERM: what a scheduler sends before it takes a machine away. A run saves and goes.

Where nothing is under way that a checkpoint would hold, the process ends at once; in training it
ends after the step that is being computed, with a checkpoint. Its exit code asks for a new start.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["REQUEUE", "Terminated", "deferred", "heeded", "install", "request", "requested"]

REQUEUE = 75
"""Exit code after SIGTERM (EX_TEMPFAIL): start the same command again and it resumes."""
REPEATED = 10.0
"""Seconds in which a second signal is the same request: a scheduler and a parent process may both
send one, and the second must not end what the first one has begun to close."""


class Terminated(BaseException):
    """The process was asked to end; what was done is kept."""


class _State:
    def __init__(self) -> None:
        self.requested = threading.Event()
        self.depth = 0
        self.heeded_at: float | None = None
        self.tell: Callable[[], None] | None = None


_STATE = _State()


def requested() -> bool:
    """Whether the process was asked to end while that was deferred."""
    return _STATE.requested.is_set()


def request() -> None:
    """Note a request that reached another process of the same training."""
    _STATE.requested.set()


def _end() -> None:
    _STATE.requested.clear()
    _STATE.heeded_at = time.monotonic()
    raise Terminated


def _handle(number: int, frame: FrameType | None) -> None:
    if _STATE.depth:
        _STATE.requested.set()
        if _STATE.tell is not None:
            _STATE.tell()
    elif _STATE.heeded_at is None or time.monotonic() - _STATE.heeded_at > REPEATED:
        _end()


def install(number: int = signal.SIGTERM) -> None:
    """Handle SIGTERM in this process, or another signal as if it were; only its main thread can."""
    if threading.current_thread() is threading.main_thread():
        _STATE.requested.clear()
        _STATE.heeded_at = None
        signal.signal(number, _handle)


@contextmanager
def deferred(tell: Callable[[], None] | None = None) -> Iterator[None]:
    """Within this context a request is only noted, for `requested` to tell, and passed on to
    `tell`; at its end it takes effect.

    Raises:
        Terminated: at the end, if there was a request.
    """
    before = _STATE.tell
    _STATE.tell = tell or before
    _STATE.depth += 1
    try:
        yield
    finally:
        _STATE.depth -= 1
        _STATE.tell = before
    if not _STATE.depth and requested():
        _end()


@contextmanager
def heeded(*more: int) -> Iterator[None]:
    """Within this context a request takes effect, in a process that a launcher has started too.

    Outside of it such a process only notes it: between two cells an exception would break the
    launcher, and with it what its other processes do. `more`: other signals that ask for the same.

    Raises:
        Terminated: in the middle, or at once if there was a request before.
    """
    for number in (signal.SIGTERM, *more):
        if signal.getsignal(number) is not _handle:
            _STATE.depth = 1
            install(number)
    outside = _STATE.depth
    try:
        _STATE.depth, _STATE.heeded_at = 0, None
        if requested():
            _end()
        yield
    finally:
        _STATE.depth = outside
