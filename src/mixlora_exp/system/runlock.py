"""Lock of a run: one process at a time, on any number of machines that share a file system.

The lock is a sequence of numbered files, and the process that creates the next number holds it.
Only the creation of a new file needs to be atomic, which holds on network file systems too. No
clocks are compared: a holder increments a counter in its file, and an observer on another machine
considers it dead if the counter does not change for `PATIENCE` seconds.
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

BEAT = 5.0
"""Seconds between heartbeats (increments of the counter) of a holder."""
PATIENCE = 6 * BEAT
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""


KEPT = 8
"""Number of earlier lock files kept, so that a slow process that found the lock free cannot create
an old number again."""


def _boot() -> str:
    """Return the identifier of this boot of the machine, which distinguishes containers with one
    host name."""
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
    """Return the identifier of the PID namespace, within which process ids are unique."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str | None:
    """Start time of a process, which distinguishes reused pids; None if it is dead or hidden.

    In ticks since boot, as Linux stores it; psutil's conversion to time of day would change with
    the wall clock.
    """
    with contextlib.suppress(OSError, IndexError):
        # The preceding process name, in parentheses, may contain any characters.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).create_time())
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a lock file; None if it cannot be read (truncated, or not visible
    yet)."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _number(name: str) -> int | None:
    # `isdigit` alone is true of digits of other scripts and of superscripts, too.
    return int(name) if name.isascii() and name.isdigit() else None


def _newest(folder: Path) -> int:
    numbers = (_number(path.name) for path in folder.glob("[0-9]*"))
    return max((number for number in numbers if number is not None), default=0)


def _dead_here(holder: dict[str, Any]) -> bool | None:
    """Return whether a holder on this machine is dead; None if unknown: on another machine, or
    hidden by the system."""
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
    # It exists but is not readable: hidden, or a zombie.
    return True if Path(f"/proc/{pid}/stat").exists() else None


def _abandoned(path: Path) -> bool:
    """Return whether a file is one that a process of this machine was writing when it ended."""
    if not path.name.startswith("."):
        return False
    writer = _read(path)
    return writer is not None and _dead_here(writer) is True


def _alive(path: Path, patience: float) -> bool:
    """Return whether the holder of a lock file is alive."""
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
    """Return the holder of the lock in `folder`, as far as known without waiting; None if it is
    free."""
    number = _newest(folder)
    holder = _read(folder / str(number)) if number else None
    if holder is None or holder.get("released") or _dead_here(holder):
        return None
    return holder


class RunLock:
    """The lock of one run, in `folder`.

    `acquire` takes the lock if it is free; while it is held, a thread sends heartbeats. `lost` is
    set when another process has taken it over, because this one was suspended for too long; `held`
    checks that.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.folder, self._beat, self._patience = folder, beat, patience
        self._number, self._count, self._followed = 0, 0, 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = threading.Event()

    def acquire(self) -> bool:
        """Take the lock if it is free or its holder is dead; returns whether this process has it.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            return self.take()
        except OSError as error:
            raise UserError(
                f"output_dir={self.folder.parent.parent} cannot be written ({error.strerror}): "
                "choose another output_dir"
            ) from error

    def take(self) -> bool:
        """Acquire the lock as `acquire` does, without its `UserError`: for folders of no run.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            number = _newest(self.folder)
            if number and _alive(self.folder / str(number), self._patience):
                return False
            try:
                if self._create(number + 1):
                    break
            except FileNotFoundError:
                # Its holder has removed the folder (`discard`).
                self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat_on, name="run lock", daemon=True)
        self._thread.start()
        return True

    def _create(self, number: int) -> bool:
        """Create the lock file of a number atomically; false if it or a later one exists."""
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
            # Meanwhile others held and released the lock, and removed this number's old file.
            path.unlink(missing_ok=True)
            return False
        self._number = number
        for old in range(max(1, number - 2 * KEPT), number - KEPT):
            with contextlib.suppress(OSError):
                (self.folder / str(old)).unlink()
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

    @property
    def number(self) -> int:
        """Number of the lock file that this process holds; 0: none."""
        return self._number

    def follow(self, number: int) -> None:
        """Let `held` tell of the lock file `number`, which another process of this start holds."""
        self._followed = number

    def held(self) -> bool:
        """Return whether this process, or the one that it follows, still holds the lock, according
        to the folder's current state."""
        number = self._number or self._followed
        if number and not self.lost.is_set():
            with contextlib.suppress(OSError):
                if _newest(self.folder) > number:
                    self.lost.set()
        return not self.lost.is_set()

    def _beat_on(self) -> None:
        while not self._stop.wait(self._beat):
            self._count += 1
            # A full disk or an interrupted network may recover until the next heartbeat.
            with contextlib.suppress(OSError):
                if not self.held():
                    return
                os.replace(self._write_temporary(self._number), self.folder / str(self._number))

    def discard(self) -> None:
        """Release the lock and remove its folder, of something that is never run again: who creates
        a number that was used before finds it done. A file of another process stays, and so does
        the folder then."""
        number, lost = self._number, self.lost.is_set()
        self.release()
        if lost or not number or _newest(self.folder) > number:
            return
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                found = _number(path.name)
                if found is not None and found <= number or _abandoned(path):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()

    def release(self) -> None:
        """Release the lock. The file stays, since numbers are never reused."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._number and not self.lost.is_set():
            path = self.folder / str(self._number)
            try:
                os.replace(self._write_temporary(self._number, released=True), path)
            except OSError:
                # On a full disk a file can still be overwritten in place.
                with contextlib.suppress(OSError), path.open("r+") as file:
                    file.write('{"released": true}')
                    file.truncate()
        self._number = 0

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
