"""Ownership of a running run by one process, and the note of a failure in its folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list

from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import write_json
from mixlora_exp.system.console import echo
from mixlora_exp.system.device import convert_out_of_memory, processes
from mixlora_exp.system.disk_faults import convert_disk_faults
from mixlora_exp.system.runlock import RunLock, holder_of

LOCK, FAILURE = "lock", "failure.json"
FOLDERS = ("trainer", "checkpoints", "adapter", "predictions")
FILES = (FAILURE, "train_log.jsonl", RECORD)
"""What a run creates or replaces in its folder."""


class LostRun(UserError):
    """Another process has taken over the run."""


class GivenUp(Exception):
    """The `watch` callback ended the run (pruned trial). The run did not fail."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[RunLock | None]:
    """Hold the lock of a run within the context; yields None if another process holds it.

    Raises:
        UserError: the folder holds something else where the run writes.
    """
    check_places(folder)
    lock, free = RunLock(folder / LOCK), [True, 0]
    if processes().is_main_process:
        free = [lock.acquire(), lock.number]
    if processes().num_processes > 1:
        broadcast_object_list(free)
        if not processes().is_main_process:
            lock.follow(free[1])
    if not free[0]:
        holder = holder_of(folder / LOCK) or {}
        where = f" ({holder.get('host')}, process {holder.get('pid')})" if holder else ""
        echo(f"Skipped, another process is running it{where}: {folder}")
        yield None
        return
    try:
        yield lock
    finally:
        # A finished run needs no lock, and its folder keeps nothing of it.
        (lock.discard if (folder / RECORD).is_file() else lock.release)()


def check_places(folder: Path) -> None:
    """Check that each place where a run writes is free, or is what the run would replace: a folder
    or a file.

    Raises:
        UserError: one is something else, such as a file where a folder will be, or a dangling link.
    """
    for names, sound, kind in (
        (FOLDERS, os.path.isdir, "folder"),
        (FILES, os.path.isfile, "file"),
    ):
        for path in (folder / name for name in names):
            if os.path.lexists(path) and not sound(path):
                raise UserError(
                    f"{path} is not a {kind}, and the run writes one there: remove it, or name "
                    "another output_dir"
                )


@contextlib.contextmanager
def failure_noted(folder: Path, lock: RunLock) -> Iterator[None]:
    """Remove an earlier failure's note from the run's folder, and write one if the run fails.

    Raises:
        UserError: a file of the run cannot be written or read.
    """
    try:
        with convert_disk_faults(f"output_dir={folder.parent}"), convert_out_of_memory():
            forget_failure(folder)
            yield
    except GivenUp:
        raise
    except Exception as error:
        note_failure(folder, error, lock)
        raise


def note_failure(folder: Path, error: BaseException | str, lock: RunLock) -> None:
    """Write the reason of a failure to the run's folder, unless another process has taken over."""
    if not lock.held():
        return
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(UserError):
        write_json(folder / FAILURE, {"error": text, "time": time.time()})


def forget_failure(folder: Path) -> None:
    """Remove the note of an earlier failure."""
    (folder / FAILURE).unlink(missing_ok=True)


def check_lock(folder: Path, lock: RunLock) -> None:
    """Refuse to write to a run that another process has taken over.

    Raises:
        LostRun: this process was suspended for so long that another one considered it dead.
    """
    if not lock.held():
        raise LostRun(
            f"{folder}: another process took over this run, because this one did not respond for "
            "a while; the run continues there, and this process stops writing"
        )
