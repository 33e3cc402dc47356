"""Finished runs as the tables see them: what was trained, what was scored, under which conditions.

A record that cannot be trusted or placed is left out by name, never averaged in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora_exp.errors import UserError
from mixlora_exp.results.record import read_record

__all__ = ["RECORD", "LeftOut", "Run", "check_run", "load_runs", "read_predictions"]

RECORD = "record.json"
# What was scored, and what it was trained with; fields that change no result beyond rounding
# (micro-batches, precision, how loss and products are computed) are no condition.
DATA_FIELDS = ("name", "cutoff_length", "boolq_passage")
TRAINING_DATA_FIELDS = ("train_limit", "forms")
TRAINER_FIELDS = (
    "learning_rate", "batch_size", "epochs", "max_steps", "weight_decay", "schedule",
    "warmup_steps", "max_grad_norm", "loss_on",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A record that no table uses, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """One record. `trained` is the configuration of the training run (of another record, when an
    adapter was scored again), `scored` that of the scoring; both are this record's own otherwise.
    `scores`: by (task, protocol)."""

    name: str
    folder: Path
    record: Mapping[str, Any] = field(repr=False)
    trained: Mapping[str, Any] = field(repr=False)
    scored: Mapping[str, Any] = field(repr=False)
    scores: Mapping[tuple[str, str], Mapping[str, Any]] = field(repr=False)

    @property
    def model(self) -> str:
        return self.trained["model"]["name"]

    @property
    def method(self) -> str:
        return self.trained["method"]["name"]

    @property
    def seed(self) -> int:
        return self.trained["seed"]

    @property
    def mix(self) -> tuple[str, ...]:
        """The tasks that were trained on; none for the base model."""
        return () if self.method == "none" else tuple(self.trained["task"]["train"])

    def conditions(self) -> dict[str, Any]:
        """What must be equal for two results to stand in one cell, besides model, method, tasks,
        protocol and seed."""
        data, own = self.scored["data"], self.trained["data"]
        found = {f"data.{name}": data[name] for name in DATA_FIELDS}
        found["evaluation.limit"] = self.scored["evaluation"]["limit"]
        if data["name"] == "embedded" or found["evaluation.limit"] is not None:
            found["data.seed"] = data.get("seed", 0)
        if self.method != "none":
            found |= {f"data.{name}": own[name] for name in TRAINING_DATA_FIELDS}
            if own["train_limit"] is not None:
                found["data.seed"] = own.get("seed", 0)
            found |= {f"trainer.{name}": self.trained["trainer"][name] for name in TRAINER_FIELDS}
            if self.trained["method"].get("dora") and self.record["kernel"] == "peft":
                # PEFT's DoRA drops the frozen product's input too: another method in training.
                found["kernel"] = "peft"
        return found

    def test_hashes(self, task: str) -> tuple[str, ...]:
        """Hashes of the files that the task's items came from."""
        return tuple(file["sha256"] for file in self.record["data"][f"{task}/test"])

    def train_rows(self, task: str) -> int | None:
        """Rows of the task's training split, None where none was read."""
        own = self.record["adapter"] or {}
        data = (own.get("trained_by") or self.record)["data"]
        files = data.get(f"{task}/train")
        return None if files is None else sum(file["rows"] for file in files)


def _placed(path: Path) -> Run:
    record = read_record(path)
    git = record["provenance"]["git"]
    if record.get("status") != "finished":
        raise UserError(f"status={record.get('status')}: it is not finished")
    if git is None or git["dirty"]:
        state = "code outside of a commit" if git is None else "uncommitted changes"
        raise UserError(f"it was made with {state}")
    trained = scored = record["config"]
    adapter = record.get("adapter")
    if adapter is not None:
        source = adapter.get("trained_by")
        if source is None:
            raise UserError("the run that trained its adapter is not known")
        if source["git"] is None or source["git"]["dirty"]:
            raise UserError("its adapter was trained with uncommitted changes")
        trained = source["config"]
    scores = {(score["task"], score["protocol"]): score for score in record["scores"]}
    return Run(path.parent.name, path.parent, record, trained, scored, scores)


def load_runs(folder: Path) -> tuple[list[Run], list[LeftOut]]:
    """All runs under `folder` (`<name>/record.json`), by name, and what had to be left out.

    Left out: a record that is cut off, edited, of another version, unfinished or made from code
    that no commit has; one whose predictions do not give its accuracies.
    """
    runs, left_out = [], []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            runs.append(check_run(path))
        except UserError as error:
            left_out.append(LeftOut(path.parent.name, str(error)))
    return runs, left_out


def check_run(path: Path) -> Run:
    """Read one record and its predictions.

    Raises:
        UserError: why no table can use it.
    """
    try:
        run = _placed(path)
        for task, protocol in run.scores:
            read_predictions(run, task, protocol)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a field of the record is missing or odd ({error})") from error
    return run


def read_predictions(run: Run, task: str, protocol: str) -> dict[str, bool]:
    """Item -> whether it was answered rightly.

    Raises:
        UserError: the file is missing, cut off, or does not give the record's accuracy.
    """
    name = run.record["predictions"].get(f"{task}/{protocol}")
    score = run.scores[task, protocol]
    if name is None or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{run.name}: it names no predictions of {task} under {protocol}")
    try:
        with (run.folder / name).open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        right = {}
        for row in rows:
            # Some data sets repeat an id.
            key = row["id"] if row["id"] not in right else f"{row['id']}#{len(right)}"
            right[key] = row["prediction"] == row["answer"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run.name}: {name} cannot be read ({error})") from error
    if len(rows) != score["n"] or abs(sum(right.values()) / score["n"] - score["accuracy"]) > 1e-9:
        raise UserError(f"{run.name}: {name} does not give the accuracy of its record")
    return right
