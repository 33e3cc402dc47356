"""Runs in processes of their own, which can be killed: started from a server that has imported
everything, so that each takes a fraction of a second."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from forked import CONTEXT

from mixlora_exp.records.outcome import outcomes

SMALL = [
    "experiment=smoke",
    "data.train_limit=40",
    "trainer.max_steps=12",
    "trainer.save_steps=2",
    "trainer.logging_steps=1",
    "trainer.precision=float32",
    "evaluation.protocols=[label_logits,answer_text]",
    "evaluation.batch_check=0",
]


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after a run touched a file of a stage for the `count`-th time; the run then
    sends itself the signal `number`."""

    stage: str
    count: int
    delay: float
    number: int = signal.SIGKILL


STAGES = {
    "checkpoints": "checkpoint",
    "train_log.jsonl": "training",
    "adapter": "adapter",
    "predictions": "predictions",
    "record.json": "record",
}
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def stage_of(event: str, args: tuple[Any, ...], output: Path) -> str | None:
    """The stage of a run to which a change of a file belongs; None for reading, and for others'."""
    if event not in CHANGES:
        return None
    if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        return None
    path = args[1] if event == "os.rename" else args[0]
    if not isinstance(path, str | os.PathLike):
        return None
    try:
        parts = Path(path).relative_to(output).parts
    except ValueError:
        return None
    if len(parts) < 2:
        return None
    if parts[1].startswith(".adapter.partial"):
        return "adapter"
    return "record" if parts[1].startswith(".record.json") else STAGES.get(parts[1])


def watch_files(output: Path, notes: str, moment: Moment | None) -> None:
    """Note every change that this process makes to files of its run, and kill or stop it at a
    moment."""
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    seen: Counter[str] = Counter()

    def die() -> None:
        time.sleep(moment.delay)
        os.kill(os.getpid(), moment.number)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        stage = stage_of(event, args, output)
        if stage is None:
            return
        seen[stage] += 1
        os.write(descriptor, f"{stage}\n".encode())
        if moment is not None and (stage, seen[stage]) == (moment.stage, moment.count):
            threading.Thread(target=die, daemon=True).start()

    sys.addaudithook(hook)


def _run(argv: list[str], log: str, moment: Moment | None) -> None:
    import torch

    from mixlora_exp.cli.train import execute

    torch.set_num_threads(1)
    # What it prints belongs to the test that reads it.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    output = next(word.partition("=")[2] for word in argv if word.startswith("output_dir="))
    watch_files(Path(output), log + "-files", moment)
    os._exit(execute(argv))


@dataclass
class Started:
    """A run in its own process."""

    process: Any
    log: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 240) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.told()[-2000:]}"
        return self.process.exitcode

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def touched(self) -> list[str]:
        """The stages of the files that it changed, in their order."""
        notes = self.log.with_name(self.log.name + "-files")
        return notes.read_text().split() if notes.exists() else []


@dataclass
class Starter:
    """Starts command lines of `train.py`."""

    folder: Path
    started: list[Started] = field(default_factory=list)

    def __call__(self, *argv: str, killed: tuple[Any, ...] | None = None) -> Started:
        """`killed`: the `Moment` at which it kills itself, or stands still on SIGSTOP."""
        log = self.folder / f"log-{len(self.started)}"
        moment = None if killed is None else Moment(*killed)
        process = CONTEXT.Process(target=_run, args=([*SMALL, *argv], str(log), moment))
        process.start()
        self.started.append(Started(process, log))
        return self.started[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for each in starter.started:
        if each.process.is_alive():
            each.kill()
        each.process.join()


@pytest.fixture
def contents() -> Callable[[Path], dict[str, Any]]:
    """What the finished runs of an output folder came to."""
    return outcomes


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait until something holds."""

    def wait(condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)

    return wait
