"""`tracker=tensorboard` and `tracker=wandb`: send a run's figures while it trains.

A failing service never stops the run, whose own files contain everything.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerCallback

from mixlora_exp.config.schema import Config
from mixlora_exp.config.schema import Tracker as Service
from mixlora_exp.records.files import RECORD
from mixlora_exp.system.device import peak_memory_bytes
from mixlora_exp.training.job import Job
from mixlora_exp.training.progress import Pace

SCORES = ("task", "protocol", "accuracy_before", "accuracy", "accuracy_normalized", "stderr",
          "majority_class", "chance", "gold_log_likelihood", "n")  # fmt: skip

Values = Mapping[str, Any]


class _TensorBoard:
    """transformers' own callback, with event files in the run's folder."""

    def __init__(self, config: Config, folder: Path, identity: str) -> None:
        self._folder = str(folder / "tensorboard")

    def begin(self, step: int) -> TrainerCallback:
        # Repeated steps replace earlier entries.
        return TensorBoardCallback(self._writer(purge_step=step + 1))

    def _writer(self, **options: Any) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, **options)

    def end(self, rows: list[list[Any]]) -> None:
        if rows:
            lines = [SCORES, ["---"] * len(SCORES), *rows]
            shown = (["" if value is None else str(value) for value in line] for line in lines)
            with self._writer() as writer:
                writer.add_text("scores", "\n".join("|".join(line) for line in shown))


class _Wandb(TrainerCallback):
    """A W&B run whose id is the run's fingerprint, so that a resumed run continues it; W&B ignores
    steps it already has. transformers' callback supports one W&B run per process, but several
    adapters need one each."""

    def __init__(self, config: Config, folder: Path, identity: str) -> None:
        import wandb

        from mixlora_exp.config.resolve import to_dict

        self._wandb, self._folder = wandb, folder
        # W&B cannot delete logged steps, so a forced run gets a new id.
        suffix = f"-{secrets.token_hex(4)}" if config.force else ""
        self._run = wandb.init(
            project=config.tracker.project,
            id=identity[:32] + suffix,
            resume="allow",
            name=folder.name,
            group=group_of(config),
            mode=config.tracker.mode,
            dir=str(folder),
            config=to_dict(config),
            reinit="create_new",
            settings=wandb.Settings(init_timeout=60, silent=True),
        )

    def begin(self, step: int) -> TrainerCallback:
        return self

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        # With the names that transformers' callbacks use.
        self._run.log({f"train/{name}": value for name, value in logs.items()}, state.global_step)

    def end(self, rows: list[list[Any]]) -> None:
        for row in rows:
            values = dict(zip(SCORES, row, strict=True))
            name = f"score/{values['task']}/{values['protocol']}"
            self._run.summary[name] = values["accuracy"]
        if rows:
            self._run.log_artifact(self._files(rows))
        self._run.finish(exit_code=0 if rows else 1)

    def _files(self, rows: list[list[Any]]) -> Any:
        """Record, log and predictions as an artifact, with a table of the scores."""
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
        for name in (RECORD, "train_log.jsonl", "predictions/*.jsonl"):
            for path in sorted(self._folder.glob(name)):
                artifact.add_file(str(path))
        artifact.add(self._wandb.Table(columns=list(SCORES), data=rows), "scores")
        return artifact


class RunTracker(TrainerCallback):
    """Sends the log entries of one adapter to a service. Exceptions of the service are counted in
    `failures`, and the first one is reported."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.failures, self._name = 0, name
        self._service: Any = None
        self._callback: Any = None
        self._job: Job | None = None
        self._pace: Pace | None = None
        self._try(lambda: setattr(self, "_service", make()))

    def follow(self, job: Job) -> RunTracker:
        """Send the log entries of `job`; call before training."""
        self._job, self._pace = job, Pace(lambda: int(job.track.tokens))
        return self

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - no failure of a service may stop the run
            self.failures += 1
            if self.failures == 1:
                sys.stderr.write(
                    f"warning: tracker={self._name} failed: {error}. The run continues, and its "
                    "own files contain everything\n"
                )

    def _pass_on(self, event: str, args, state, control, **kwargs: Any) -> None:
        if self._callback is not None and state.is_world_process_zero:
            call = getattr(self._callback, event)
            self._try(lambda: call(args, state, control, **kwargs))

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Start or continue the service's run at the job's step."""
        if self._service is not None and state.is_world_process_zero:
            self._pace.begin(self._job.step)
            step = self._job.step
            self._try(lambda: setattr(self, "_callback", self._service.begin(step)))
        self._pass_on("on_train_begin", args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        """Send the entry with tokens per second, peak memory in GiB and expert load."""
        entry = {
            **logs,
            "tokens_per_second": self._pace.look(),
            "memory_gib": peak_memory_bytes(args.device) / 2**30,
            "expert_load": self._job.expert_load,
        }
        self._pass_on("on_log", args, state, control, logs=flat(entry), **kwargs)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        """Tell the service that training ended, and drop references to the trainer and the job."""
        self._pass_on("on_train_end", args, state, control, **kwargs)
        # They reference the trainer and the job, whose memory is needed for scoring.
        self._job = self._callback = self._pace = None

    def close(self, record: Values | None) -> None:
        """End the service's run: as successful with the run's record, as failed without."""
        if self._service is not None:
            rows = [] if record is None else score_rows(record)
            self._try(lambda: self._service.end(rows))


def flat(values: Values) -> dict[str, float]:
    """Return numbers by name; the expert load (layers, E) becomes one entry per layer and
    expert."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found |= {
                f"{name}/layer{layer}/expert{expert}": share
                for layer, row in enumerate(value)
                for expert, share in enumerate(row)
            }
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def score_rows(record: Values) -> list[list[Any]]:
    """Return the scores of a record: one row per task and protocol, with the columns `SCORES`."""
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


def start_tracker(config: Config, folder: Path, identity: str) -> RunTracker | None:
    """Return the tracker chosen by `config`, or None. `identity`: the run's fingerprint."""
    made = {Service.wandb: _Wandb, Service.tensorboard: _TensorBoard}.get(config.tracker.name)
    if made is None:
        return None
    return RunTracker(config.tracker.name.value, lambda: made(config, folder, identity))


def group_of(config: Config) -> str:
    """Return the name that the runs of a sweep share in a tracker."""
    if config.tracker.group is not None:
        return config.tracker.group
    return f"{config.model.name}-{config.task.name}-{config.data.name.value}"
