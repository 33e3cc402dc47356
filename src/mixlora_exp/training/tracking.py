"""Where progress is sent besides the run's own folder. A tracker that fails, hangs or lags behind
never stops a run: it works in a thread of its own, and what it cannot take is dropped."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mixlora_exp.config.schema import Config, Tracker

__all__ = ["Tracking", "start_tracking"]

WAITING = 1000
"""Entries that may wait for a slow tracker."""
GRACE = 30.0
"""Seconds that a run waits at its end for a tracker that has not sent everything."""

Values = Mapping[str, Any]


class Sink(Protocol):
    """A service that takes numbers; made, used and closed in one thread."""

    def log(self, step: int, values: Values) -> None: ...

    def close(self, files: Sequence[Path]) -> None: ...


class _Wandb:
    def __init__(self, config: Config, folder: Path, identity: str, group: str | None) -> None:
        import wandb

        from mixlora_exp.config import to_dict  # Needs Hydra, which benchmarks do without.

        self._wandb = wandb
        # Its id is the run's fingerprint: a run that goes on after a kill goes on there as well.
        self._run = wandb.init(
            project=config.tracker.project,
            id=identity[:32],
            resume="allow",
            name=folder.name,
            group=group,
            mode=config.tracker.mode,
            dir=str(folder),
            config=to_dict(config),
            # The next cell of a sweep, or another adapter, is a run of its own.
            reinit="create_new",
            settings=wandb.Settings(init_timeout=60, silent=True),
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self, files: Sequence[Path]) -> None:
        if files:
            artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
            for path in files:
                artifact.add_file(str(path))
            self._run.log_artifact(artifact)
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, files: Sequence[Path]) -> None:
        self._writer.close()


class Tracking:
    """Sends entries to a sink that `make` makes, in a thread of its own."""

    def __init__(self, name: str, make: Callable[[], Sink], grace: float = GRACE) -> None:
        self._name, self._make, self._grace = name, make, grace
        self._entries: queue.Queue[tuple[int, Values] | Sequence[Path]] = queue.Queue(WAITING)
        self._told = False
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
            sink = self._make()
            while True:
                entry = self._entries.get()
                if isinstance(entry, tuple):
                    sink.log(*entry)
                else:
                    sink.close(entry)
                    return
        except BaseException as error:  # noqa: BLE001 - whatever it raises, the run goes on
            self._tell(error)

    def log(self, step: int, values: Values) -> None:
        """Hand over one entry; returns at once."""
        try:
            self._entries.put_nowait((step, flat(values)))
        except queue.Full:
            self._tell("it does not keep up")

    def close(self, files: Sequence[Path] = ()) -> None:
        """Hand over the run's files and wait, for a while, until everything is sent."""
        try:
            self._entries.put_nowait([path for path in files if path.is_file()])
        except queue.Full:
            self._tell("it does not keep up")
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
            return Tracking("wandb", lambda: _Wandb(config, folder, identity, group))
        case Tracker.tensorboard:
            return Tracking("tensorboard", lambda: _TensorBoard(folder))
    return None
