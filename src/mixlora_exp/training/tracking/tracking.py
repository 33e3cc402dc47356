"""Where progress is sent besides the run's own folder. A tracker that fails, hangs or lags behind
never stops a run: it works in a thread of its own, and what it cannot take is dropped."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mixlora_exp.config.schema import Config, Tracker
from mixlora_exp.training.tracking.sinks import (
    LOG,
    RECORD,
    TensorBoardSink,
    Values,
    WandbSink,
    read_log,
)

__all__ = ["Tracking", "group_of", "start_tracking"]

WAITING = 1000
"""Entries that may wait for a slow tracker."""
GRACE = 30.0
"""Seconds that a run waits at its end for a tracker that has not sent everything."""


class Sink(Protocol):
    """A service that takes numbers; made, used and closed in one thread."""

    def begin(self, step: int, entries: Sequence[tuple[int, Values]]) -> None:
        """Training goes on after `step`. `entries`: everything up to there, of which the service
        may lack some."""

    def log(self, step: int, values: Values) -> None: ...

    def close(self, files: Sequence[Path]) -> None: ...


class Tracking:
    """Sends entries to a sink that `make` makes, in a thread of its own."""

    def __init__(self, name: str, make: Callable[[], Sink], grace: float = GRACE) -> None:
        self._name, self._make, self._grace = name, make, grace
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(WAITING)
        self._told, self._begun = False, False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _tell(self, problem: object) -> None:
        if not self._told:
            self._told = True
            sys.stderr.write(
                f"warning: tracker={self._name} is left out from here on: {problem}. The run goes "
                "on, and its own files have everything\n"
            )

    def _work(self) -> None:
        try:
            sink, name = self._make(), ""
            while name != "close":
                name, arguments = self._calls.get()
                getattr(sink, name)(*arguments)
        except BaseException as error:  # noqa: BLE001 - whatever it raises, the run goes on
            self._tell(error)

    def _put(self, name: str, *arguments: Any) -> bool:
        """Hand over one call; returns at once, false where too many are waiting."""
        try:
            self._calls.put_nowait((name, arguments))
        except queue.Full:
            self._tell("it does not keep up")
            return False
        return True

    def begin(self, step: int, log: Path) -> None:
        """Training goes on after `step`; what an earlier start of the run did not come to send is
        taken from its `log`, which ends there."""
        self._begun = True
        self._put("begin", step, [(number, flat(entry)) for number, entry in read_log(log)])

    def log(self, step: int, values: Values) -> None:
        """Hand over one entry; returns at once."""
        self._put("log", step, flat(values))

    def close(self, files: Sequence[Path] = ()) -> None:
        """Hand over the run's files and wait, for a while, until everything is sent."""
        found = {path.name: path for path in files if path.is_file()}
        if not self._begun and {LOG, RECORD} <= set(found):
            # All steps were done before this start.
            self.begin(max((step for step, _ in read_log(found[LOG])), default=0), found[LOG])
        if not self._put("close", list(found.values())):
            return
        self._thread.join(self._grace)
        if self._thread.is_alive():
            self._tell(f"it has not answered for {self._grace:g} seconds")


def flat(values: Values) -> dict[str, float]:
    """Numbers by name; the expert load (layers, E) becomes a number for each layer and expert."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found |= {
                f"{name}/layer{layer}/expert{expert}": share
                for layer, row in enumerate(value)
                for expert, share in enumerate(row)
            }
        elif isinstance(value, (int, float)):
            found[f"train/{name}"] = value
    return found


def start_tracking(
    config: Config, folder: Path, identity: str, group: str | None = None
) -> Tracking | None:
    """The tracker that `config` asks for, None without one. `identity`: the run's fingerprint;
    `group`: the experiment that it belongs to."""
    match config.tracker.name:
        case Tracker.wandb:
            return Tracking("wandb", lambda: WandbSink(config, folder, identity, group))
        case Tracker.tensorboard:
            return Tracking("tensorboard", lambda: TensorBoardSink(folder, config.force))
    return None


def group_of(config: Config) -> str:
    """The name that the runs of a sweep share in a tracker."""
    if config.tracker.group is not None:
        return config.tracker.group
    return f"{config.model.name}-{config.task.name}-{config.data.name.value}"
