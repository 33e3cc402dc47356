"""Which process works on a run: one at a time, on any number of machines with one file system.

The lock of a run is a row of numbered files. Whoever creates the next number holds it; nothing but
the creation of a file under a name that did not exist needs to be atomic, which holds on network
file systems too. No clock is read: a holder on another machine counts up in its file, and is dead
when the count stands still for as long as an observer waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from mixlora_exp.errors import UserError
from mixlora_exp.system.untrusted import read_json

__all__ = ["RunLock", "holder_of"]

BEAT = 5.0
"""Seconds between two counts of a holder."""
PATIENCE = 6 * BEAT
"""Seconds without a new count after which a holder on another machine is dead."""


KEPT = 8
"""Earlier lock files that stay: one who found the lock free long ago meets a file that exists."""


def _boot() -> str:
    """What tells this start of this machine from others, also in containers of one host name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(psutil.boot_time())


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _namespace() -> str:
    """Process numbers mean something only within one."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None if it is dead or hidden.

    Linux counts in ticks since the machine started. As a time of day, which psutil makes of them,
    it would move with the wall clock.
    """
    with contextlib.suppress(OSError, IndexError):
        # The name before it, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).create_time())
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """What the holder wrote, None where it cannot be read: cut off, say, or not visible yet."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _newest(folder: Path) -> int:
    numbers = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    return max(numbers, default=0)


def _dead_here(holder: dict[str, Any]) -> bool | None:
    """Whether a holder of this machine is dead; None where that cannot be told: another machine's,
    or a process that the system hides."""
    me = _this_process()
    if any(holder.get(key) != me[key] for key in ("host", "boot", "namespace")):
        return None
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return True
    started = _started(pid)
    if started is not None:
        return started != holder.get("started")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return None
    # There, and no look at it: hidden, or dead and not yet fetched by its parent.
    return True if Path(f"/proc/{pid}/stat").exists() else None


def _alive(path: Path, patience: float) -> bool:
    """Whether the holder of a lock file still works on it."""
    before = _read(path)
    if before is not None and before.get("released"):
        return False
    if before is not None:
        dead = _dead_here(before)
        if dead is not None:
            return not dead
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(0.2, patience / 10))
        now = _read(path)
        if now is not None and now.get("released"):
            return False
        if now is not None and (before is None or now.get("count") != before.get("count")):
            return True
    return False


def holder_of(folder: Path) -> dict[str, Any] | None:
    """Who works on the run whose lock is in `folder`, as far as can be told without waiting."""
    number = _newest(folder)
    holder = _read(folder / str(number)) if number else None
    if holder is None or holder.get("released") or _dead_here(holder):
        return None
    return holder


class RunLock:
    """The lock of one run, in `folder`.

    `acquire` takes it or says who has it; while it is held a thread counts. `lost` is set when
    another process has taken it over, because this one stood still for too long; `held` looks.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.folder, self._beat, self._patience = folder, beat, patience
        self._number, self._count = 0, 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = threading.Event()

    def acquire(self) -> bool:
        """Whether the lock was free, or its holder dead, and is now this process's.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            return self.take()
        except OSError as error:
            raise UserError(
                f"output_dir={self.folder.parent.parent}: cannot be written ({error.strerror}); "
                "choose another output_dir"
            ) from error

    def take(self) -> bool:
        """The same for a folder that is not a run's.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            number = _newest(self.folder)
            if number and _alive(self.folder / str(number), self._patience):
                return False
            if self._create(number + 1):
                break
        self._thread = threading.Thread(target=self._beat_on, name="run lock", daemon=True)
        self._thread.start()
        return True

    def _create(self, number: int) -> bool:
        """Create the lock file of that number, whole; false where it or a later one exists."""
        temporary = self._write_temporary(number)
        path = self.folder / str(number)
        try:
            # Atomic on network file systems, where exclusive creation may not be.
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links.
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return False
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if _newest(self.folder) > number:
            # Others came and went meanwhile, and took this number's file away as an old one.
            path.unlink(missing_ok=True)
            return False
        self._number = number
        for old in range(max(1, number - 2 * KEPT), number - KEPT):
            (self.folder / str(old)).unlink(missing_ok=True)
        return True

    def _write_temporary(self, number: int, **more: Any) -> Path:
        path = self.folder / f".{number}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            path.write_text(json.dumps({**_this_process(), "count": self._count, **more}))
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return path

    def held(self) -> bool:
        """Whether this process still holds it, from the folder as it is now."""
        if self._number and not self.lost.is_set():
            with contextlib.suppress(OSError):
                if _newest(self.folder) > self._number:
                    self.lost.set()
        return not self.lost.is_set()

    def _beat_on(self) -> None:
        while not self._stop.wait(self._beat):
            self._count += 1
            # A full disk or a network that is gone for a while: the next count may get through.
            with contextlib.suppress(OSError):
                if not self.held():
                    return
                os.replace(self._write_temporary(self._number), self.folder / str(self._number))

    def release(self) -> None:
        """Let others have it. The file stays: a number is never given twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._number and not self.lost.is_set():
            path = self.folder / str(self._number)
            try:
                os.replace(self._write_temporary(self._number, released=True), path)
            except OSError:
                # On a full disk a file can still be written over, in the place that it has.
                with contextlib.suppress(OSError), path.open("r+") as file:
                    file.write('{"released": true}')
                    file.truncate()
        self._number = 0

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
