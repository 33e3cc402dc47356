"""A run while it is under way: who works on it, and what is left when it fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list

from mixlora_exp.errors import UserError
from mixlora_exp.records.record import write_json
from mixlora_exp.system.console import say
from mixlora_exp.system.device import processes
from mixlora_exp.system.runlock import RunLock, holder_of

__all__ = [
    "GivenUp",
    "LostRun",
    "check_lock",
    "failure_noted",
    "forget_failure",
    "held",
    "note_failure",
]

LOCK, FAILURE = "lock", "failure.json"


class LostRun(UserError):
    """Another process works on the run now."""


class GivenUp(Exception):
    """Who watches a run has seen enough of it. It did not fail."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[RunLock | None]:
    """The lock of a run while the context lasts, None where another process works on it."""
    lock, free = RunLock(folder / LOCK), [True]
    if processes().is_main_process:
        free = [lock.acquire()]
    if processes().num_processes > 1:
        broadcast_object_list(free)
    if not free[0]:
        holder = holder_of(folder / LOCK) or {}
        where = f" ({holder.get('host')}, process {holder.get('pid')})" if holder else ""
        say(f"Running elsewhere{where}, left alone: {folder}")
        yield None
        return
    with lock:
        yield lock


@contextlib.contextmanager
def failure_noted(folder: Path, lock: RunLock) -> Iterator[None]:
    """Leave the reason in the run's folder if it fails, and take an older one away."""
    forget_failure(folder)
    try:
        yield
    except GivenUp:
        raise
    except Exception as error:
        note_failure(folder, error, lock)
        raise


def note_failure(folder: Path, error: BaseException | str, lock: RunLock) -> None:
    """Leave the reason of a failure in the run's folder, unless it is another process's now."""
    if not lock.held():
        return
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(UserError):
        write_json(folder / FAILURE, {"error": text, "time": time.time()})


def forget_failure(folder: Path) -> None:
    """Take away what an earlier failure left."""
    (folder / FAILURE).unlink(missing_ok=True)


def check_lock(folder: Path, lock: RunLock) -> None:
    """Refuse to write where another process has taken a run over.

    Raises:
        UserError: this process stood still for so long that another one took it for dead.
    """
    if not lock.held():
        raise LostRun(
            f"{folder}: another process has taken this run over, since this one had not been heard "
            "of for a while; it goes on there, nothing more is written here"
        )
