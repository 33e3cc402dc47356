"""Handling of SIGTERM, which schedulers send before they take a machine away, and of Ctrl-C.

During training the process ends after the current step, with a checkpoint; otherwise it ends
immediately. After SIGTERM its exit code requests a restart.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = 75
"""Exit code after SIGTERM (EX_TEMPFAIL): the same command resumes."""
REPEATED = 10.0
"""Seconds within which a second signal counts as the same request: scheduler and parent process may
both send one, and the second must not interrupt the shutdown."""

SAME = 1.0
"""Seconds within which a second SIGINT is the same Ctrl-C: terminal and torchrun both send one."""


class Terminated(BaseException):
    """The process received SIGTERM; completed work is kept."""


class _State:
    def __init__(self) -> None:
        self.requested = threading.Event()
        self.depth = 0
        self.heeded_at: float | None = None
        self.interrupted_at: float | None = None
        self.notify: Callable[[], None] | None = None


_STATE = _State()


def requested() -> bool:
    """Return whether a stop was requested while handling was deferred."""
    return _STATE.requested.is_set()


def request() -> None:
    """Set the request, because another process of the same training received a signal."""
    _STATE.requested.set()


def _end() -> None:
    _STATE.requested.clear()
    interrupted, _STATE.interrupted_at = _STATE.interrupted_at is not None, None
    if interrupted:
        raise KeyboardInterrupt
    _STATE.heeded_at = time.monotonic()
    raise Terminated


def _handle(number: int, frame: FrameType | None) -> None:
    if _STATE.depth:
        _STATE.requested.set()
        if _STATE.notify is not None:
            _STATE.notify()
    elif _STATE.heeded_at is None or time.monotonic() - _STATE.heeded_at > REPEATED:
        _end()


def install(number: int = signal.SIGTERM) -> None:
    """Handle SIGTERM (or `number` like SIGTERM) in this process; only possible in the main
    thread."""
    if threading.current_thread() is threading.main_thread():
        _STATE.requested.clear()
        _STATE.heeded_at = None
        signal.signal(number, _handle)


@contextmanager
def deferred(notify: Callable[[], None] | None = None) -> Iterator[None]:
    """Within this context a signal only sets `requested` and calls `notify`; it takes effect at the
    end of the context.

    Raises:
        Terminated: at the end, if a stop was requested.
    """
    before = _STATE.notify
    _STATE.notify = notify or before
    _STATE.depth += 1
    try:
        yield
    finally:
        _STATE.depth -= 1
        _STATE.notify = before
    if not _STATE.depth and requested():
        _end()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _STATE.interrupted_at is None:
        _STATE.interrupted_at = time.monotonic()
        _STATE.requested.set()
    elif time.monotonic() - _STATE.interrupted_at > SAME:
        raise KeyboardInterrupt


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Within this context, which is inside `deferred`, Ctrl-C requests a stop like SIGTERM; a
    second one ends the process now. At its end `deferred` then raises `KeyboardInterrupt`.

    A process that ignores SIGINT, as in the background of a shell, still ignores it.
    """
    _STATE.interrupted_at = None
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def heeded(*more: int) -> Iterator[None]:
    """Within this context a signal takes effect, also in a process started by a launcher.

    Outside the context such a process only records it: between two cells an exception would break
    the launcher, and thus its other processes. `more`: further signals with the same effect.

    Raises:
        Terminated: on a signal, or immediately if a stop was requested before.
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
