"""Files through which the processes of a sweep share the start and the result of each job.

They preserve results when a process pool breaks, so that it can be restarted.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

STOP = "stop"


@dataclass(frozen=True, slots=True)
class Ledger:
    """A folder of files on the jobs of a sweep, by number; all processes are on one machine."""

    folder: Path
    alone: int | None = None
    """The job that may start again although a process was killed while executing it."""

    def may_begin(self, number: int) -> bool:
        """Return whether a job may start: if its process was killed, only as `alone`."""
        return number == self.alone or not self.starts(number)

    def begin(self, number: int) -> None:
        """Record that this process executes the job."""
        path = self.folder / f"begun-{number}-{self.starts(number)}"
        self._write(path, json.dumps(os.getpid()).encode())

    def end(self, number: int, outcome: Any) -> None:
        """Record the result of the job."""
        self._write(self.folder / f"ended-{number}", pickle.dumps(outcome))

    def outcome(self, number: int) -> Any:
        """Return the result of the job, None if it has not ended."""
        path = self.folder / f"ended-{number}"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def starts(self, number: int) -> int:
        """Return the number of times that the job was started."""
        return len(list(self.folder.glob(f"begun-{number}-*")))

    def under_way(self) -> list[int]:
        """Return the jobs that were started and have not ended."""
        begun = {int(path.name.split("-")[1]) for path in self.folder.glob("begun-*")}
        return sorted(number for number in begun if self.outcome(number) is None)

    def stop(self) -> None:
        """Let no further job start, and send SIGTERM to the processes that execute one."""
        (self.folder / STOP).touch()
        # The pid of a killed process may have been reused by a process of someone else.
        own = {child.pid for child in psutil.Process().children(recursive=True)}
        for number in self.under_way():
            newest = self.folder / f"begun-{number}-{self.starts(number) - 1}"
            process = json.loads(newest.read_bytes())
            if process in own:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)

    @property
    def stopped(self) -> bool:
        """True if no further job may start."""
        return (self.folder / STOP).exists()

    def _write(self, path: Path, content: bytes) -> None:
        """Write atomically: the process may be killed at any moment."""
        temporary = self.folder / f".{path.name}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(path)
