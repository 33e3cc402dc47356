"""The services behind `tracker=wandb` and `tracker=tensorboard`: what a run sends them, so that one
that goes on after a kill has each step once."""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlora_exp.config.schema import Config
from mixlora_exp.records.files import RECORD
from mixlora_exp.system.untrusted import json_lines, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LOG", "RECORD", "TensorBoardSink", "Values", "WandbSink", "loss_figure", "read_log",
           "score_rows"]  # fmt: skip

LOG = "train_log.jsonl"
SCORES = ("task", "protocol", "accuracy_before", "accuracy", "accuracy_normalized", "stderr",
          "majority_class", "chance", "gold_log_likelihood", "n")  # fmt: skip

Values = Mapping[str, Any]


def read_log(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The entries of a run's log by step, up to where a kill cut it off; none without a log."""
    found = []
    try:
        for _, entry in json_lines(path):
            found.append((entry.pop("step"), entry))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    return found


def score_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """The scores of a record, a row per task and protocol, in the columns `SCORES`."""
    before = {(s["task"], s["protocol"]): s["accuracy"] for s in record["scores_before"] or []}
    return [
        [
            before.get((score["task"], score["protocol"]))
            if name == "accuracy_before"
            else score.get(name)
            for name in SCORES
        ]
        for score in record["scores"]
    ]


def loss_figure(files: Iterable[Path]) -> Figure | None:
    """Loss and router loss over the steps of the log among a run's files; None without a log or
    without matplotlib."""
    entries = [entry for path in files if path.name == LOG for entry in read_log(path)]
    if not entries or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # Not pyplot, which keeps state and wants one thread.

    figure = Figure(figsize=(6, 4), layout="constrained")
    lower = figure.subplots()
    for name in ("loss", "router_loss"):
        points = [(step, entry[name]) for step, entry in entries if entry.get(name) is not None]
        if points:
            lower.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    lower.set_xlabel("optimizer step")
    lower.legend()
    return figure


class _Sent:
    """Up to which step a service has a run's entries, and under which name; kept in a file beside
    what the service keeps, so that the next start of the run knows it."""

    def __init__(self, path: Path, identity: str, anew: bool) -> None:
        self._path, self.identity, self.step = path, identity, -1
        if anew:
            # Steps of a service's run cannot be taken back.
            self.identity = f"{identity}-{secrets.token_hex(4)}"
            return
        try:
            found = read_json(path)
            self.identity, self.step = str(found["id"]), int(found["step"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def note(self, step: int) -> None:
        """Everything up to `step` was sent."""
        self.step = step
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"id": self.identity, "step": step}))
        partial.replace(self._path)


def _record_among(files: Iterable[Path]) -> dict[str, Any] | None:
    """The record of a run that ended well."""
    return next((read_json(p) for p in files if p.name == RECORD), None)


class WandbSink:
    """A run of W&B's, whose id is the run's fingerprint: one that goes on after a kill goes on
    there as well. Steps that it has are not sent again, since its history only grows; `force=true`
    begins another run there."""

    def __init__(self, config: Config, folder: Path, identity: str, group: str | None) -> None:
        import wandb

        from mixlora_exp.config import to_dict  # Needs Hydra, which benchmarks do without.

        self._wandb = wandb
        self._sent = _Sent(folder / "wandb" / "sent.json", identity[:32], config.force)
        self._run = wandb.init(
            project=config.tracker.project,
            id=self._sent.identity,
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
        self._sent.note(self._sent.step)

    def begin(self, step: int, entries: Sequence[tuple[int, Values]]) -> None:
        for each in entries:
            self.log(*each)

    def log(self, step: int, values: Values) -> None:
        if step > self._sent.step:
            self._run.log(dict(values), step=step)
            self._sent.note(step)

    def close(self, files: Sequence[Path]) -> None:
        record = _record_among(files)
        if files:
            artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
            for path in files:
                artifact.add_file(str(path))
            if record is not None:
                rows = score_rows(record)
                artifact.add(self._wandb.Table(columns=list(SCORES), data=rows), "scores")
                for row in rows:
                    values = dict(zip(SCORES, row, strict=True))
                    name = f"score/{values['task']}/{values['protocol']}"
                    self._run.summary[name] = values["accuracy"]
            figure = loss_figure(files)
            if figure is not None:
                with artifact.new_file("loss.png", mode="wb") as stream:
                    figure.savefig(stream, format="png")
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if record is not None else 1)


class TensorBoardSink:
    """Event files in the run's folder. Each start has one of its own, which takes back the steps
    that are done again."""

    def __init__(self, folder: Path, anew: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder = SummaryWriter, folder / "tensorboard"
        self._sent = _Sent(self._folder / "sent.json", folder.name, anew)
        self._writer: SummaryWriter | None = None

    def begin(self, step: int, entries: Sequence[tuple[int, Values]]) -> None:
        if self._writer is not None:
            self._writer.close()
        have = min(step, self._sent.step)
        self._writer = self._make(str(self._folder), purge_step=have + 1)
        for number, values in entries:
            if number > have:
                self.log(number, values)

    def log(self, step: int, values: Values) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # Else a kill loses up to two minutes.
        self._writer.flush()
        self._sent.note(step)

    def close(self, files: Sequence[Path]) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder))
        record, last = _record_among(files), max(self._sent.step, 0)
        if record is not None:
            lines = [SCORES, ["---"] * len(SCORES), *score_rows(record)]
            shown = (["" if value is None else str(value) for value in line] for line in lines)
            self._writer.add_text("scores", "\n".join("|".join(line) for line in shown), last)
        figure = loss_figure(files)
        if figure is not None:
            self._writer.add_figure("loss", figure, last, close=False)
        self._writer.close()
