"""What the processes of one sweep tell each other: which job has begun where, and how it ended.

Results that a broken pool of processes loses are here, so that it can be started again.
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

__all__ = ["Ledger"]

STOP = "stop"


@dataclass(frozen=True, slots=True)
class Ledger:
    """A folder of notes on the jobs of a sweep, by number; all processes are of one machine."""

    folder: Path
    alone: int | None = None
    """The one job that may begin again although a process was killed while it was under way."""

    def may_begin(self, number: int) -> bool:
        """Whether it is this job's turn: one whose process was killed waits until it is alone."""
        return number == self.alone or not self.starts(number)

    def begin(self, number: int) -> None:
        """Note that this process works on the job."""
        path = self.folder / f"begun-{number}-{self.starts(number)}"
        self._write(path, json.dumps(os.getpid()).encode())

    def end(self, number: int, outcome: Any) -> None:
        """Note how the job ended."""
        self._write(self.folder / f"ended-{number}", pickle.dumps(outcome))

    def outcome(self, number: int) -> Any:
        """How the job ended, None if it has not."""
        path = self.folder / f"ended-{number}"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def starts(self, number: int) -> int:
        """How often the job was begun."""
        return len(list(self.folder.glob(f"begun-{number}-*")))

    def under_way(self) -> list[int]:
        """The jobs that were begun and have not ended."""
        begun = {int(path.name.split("-")[1]) for path in self.folder.glob("begun-*")}
        return sorted(number for number in begun if self.outcome(number) is None)

    def stop(self) -> None:
        """Let no further job begin, and ask the processes that work on one to save and end."""
        (self.folder / STOP).touch()
        # A note of a process that was killed may name a number that now is somebody else's.
        own = {child.pid for child in psutil.Process().children(recursive=True)}
        for number in self.under_way():
            newest = self.folder / f"begun-{number}-{self.starts(number) - 1}"
            process = json.loads(newest.read_bytes())
            if process in own:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)

    @property
    def stopped(self) -> bool:
        return (self.folder / STOP).exists()

    def _write(self, path: Path, content: bytes) -> None:
        """Whole or not at all: the process may be killed at any moment."""
        temporary = self.folder / f".{path.name}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(path)
