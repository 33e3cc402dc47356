"""Finished runs for the tables: what was trained and scored, under which conditions.

A record that cannot be trusted or assigned to a cell is left out by name, never averaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora_exp.config.choices import OWN_DROPOUT
from mixlora_exp.config.later_fields import completed, require_complete
from mixlora_exp.config.schema_method import MixLoraMethodConfig
from mixlora_exp.config.schema_mixture import method_class
from mixlora_exp.errors import UserError, shown
from mixlora_exp.records.files import FORCED, PACKED, RunFiles, name_of, record_paths
from mixlora_exp.records.objections import UNPLACED, code_objections
from mixlora_exp.records.record import read_run
from mixlora_exp.records.required_fields import odd_fields, predictions_name
from mixlora_exp.system.untrusted import parse_json, refuse_links
from mixlora_exp.tasks import TASKS

LIKELIHOOD = "gold_log_likelihood"
Rows = Mapping[str, Mapping[str, Any]]
# Conditions of training and scoring. The implementation of the loss only affects rounding, so it is
# not a condition. The micro-batch size is, because the router loss is computed per micro-batch.
MODEL_FIELDS = (
    "source", "hub_id", "revision", "package", "package_file", "path", "weights",
)  # fmt: skip
DATA_FIELDS = ("name", "cutoff_length", "boolq_passage")
TRAINING_DATA_FIELDS = ("train_limit", "train_limits", "forms")
TRAINER_FIELDS = (
    "learning_rate", "batch_size", "micro_batch_size", "epochs", "max_steps", "weight_decay",
    "schedule", "warmup_steps", "max_grad_norm", "loss_on", "padding_in_loss", "order",
    "betas", "final_rate",
)  # fmt: skip
EVALUATION_FIELDS = ("limit", "max_new_tokens", "dropout", "arc_labels")

GPU_MODEL = re.compile(
    r"^(?:(?:NVIDIA|AMD|Tesla|Quadro|GeForce|Instinct)\s+)*(.+?)(?:[-\s](?:SXM|PCI|HBM|NVL|\d+\s?GB).*)?$",
    re.IGNORECASE,
)


def circumstances(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the computing environment of a record, as far as it changes results by more than
    summation order: precision; kernel (`exact` stands for all that agree up to rounding; `peft` has
    other dropout masks and another DoRA); hardware (`cpu`, or the GPU model without memory size and
    form factor); torch's minor version."""
    found = {"precision": record.get("dtype")}
    if record.get("kernel") is not None:
        found["kernel"] = record["kernel"] if record["kernel"] in OWN_DROPOUT else "exact"
    # Older records of rescored adapters lack the provenance of the training.
    origin = record.get("provenance")
    if origin is not None:
        gpus = {GPU_MODEL.sub(r"\1", name) for name in origin["hardware"]["gpus"]}
        found["hardware"] = ", ".join(sorted(gpus)) or "cpu"
        found["torch"] = ".".join(str(origin["packages"]["torch"]).split(".")[:2])
    return found


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Name of a record that no table uses, and the reason; both safe to print on a terminal."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", shown(self.name, 200))
        object.__setattr__(self, "reason", shown(self.reason))


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The record at `path`.

    `trained`: configuration of the training run (that of another record if an adapter was
    rescored); `scored`: configuration of the scoring. `scores`: by (task, protocol);
    `predictions`: by the same, item id -> its line of the predictions, where repeated ids have a
    suffix.
    """

    name: str
    path: Path
    record: Mapping[str, Any] = field(repr=False)
    trained: Mapping[str, Any] = field(repr=False)
    scored: Mapping[str, Any] = field(repr=False)
    scores: Mapping[tuple[str, str], Mapping[str, Any]] = field(repr=False)
    predictions: Mapping[tuple[str, str], Rows] = field(repr=False, default_factory=dict)

    @property
    def model(self) -> str:
        """Name of the base model."""
        return self.trained["model"]["name"]

    @property
    def method(self) -> str:
        """Name of the method that trained the adapter, `none` for a base model."""
        return self.trained["method"]["name"]

    @property
    def mixture(self) -> bool:
        """True if the method has experts behind a router."""
        return method_class(self.trained["method"]) is MixLoraMethodConfig

    @property
    def seed(self) -> int:
        """Seed of the training run."""
        return self.trained["seed"]

    @property
    def preset(self) -> str:
        """Name of the preset used in training."""
        return self.trained["preset"]["name"]

    @property
    def mix(self) -> tuple[str, ...]:
        """The trained tasks; empty for the base model."""
        return () if self.method == "none" else tuple(self.trained["task"]["train"])

    @property
    def held_out(self) -> bool:
        """True if held-out training rows were scored instead of the test set."""
        return self.scored["evaluation"]["held_out"]

    @property
    def rescored(self) -> bool:
        """True if the record scores an adapter of another run."""
        return self.record.get("adapter") is not None

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        """Parameter counts of the trained model and method; None in older records."""
        return self._source().get("parameters")

    def _source(self) -> Mapping[str, Any]:
        """Return the record of the training run, or the part of it in the record of a rescoring."""
        return (self.record.get("adapter") or {}).get("trained_by") or self.record

    @property
    def data(self) -> Mapping[str, Any]:
        """Files that the run read, and those that its training read, by "task/split"."""
        read = self.record["data"]
        trained = {n: files for n, files in self._source()["data"].items() if n.endswith("/train")}
        return {**read, **{n: files for n, files in trained.items() if n not in read}}

    def conditions(self, protocol: str) -> dict[str, Any]:
        """Return conditions that two results under `protocol` must share to be in one cell, in
        addition to model, method and tasks. Names are those of the configuration; `train.*` if
        training used other data or another environment (see `circumstances`) than scoring; `rows.*`
        if files are not the published splits."""
        model = self.trained["model"]
        found = {f"model.{name}": model.get(name) for name in MODEL_FIELDS}
        if model.get("weights") == "random":
            # Pretrained weights are identified by the fields above.
            found["model.weights.config"] = model.get("config")
        # Not in older records.
        held, trained = (
            c["model"].get("quantization", "none") for c in (self.scored, self.trained)
        )
        if held != "none":
            found["model.quantization"] = held
        if trained != held:
            found["train.model.quantization"] = trained
        data, limit = self.scored["data"], self.scored["evaluation"]["limit"]
        found |= {f"data.{name}": data[name] for name in DATA_FIELDS}
        found["evaluation.limit"] = limit
        found["evaluation.dropout"] = self.scored["evaluation"]["dropout"]
        if self.scored["evaluation"].get("shuffle_experts") is not None:
            # A control: never to be mixed with the scores of the adapter as it was trained.
            found["evaluation.shuffle_experts"] = self.scored["evaluation"]["shuffle_experts"]
        if self.held_out:
            # Results on held-out rows, used for tuning, must not be mixed with test results.
            found["evaluation.held_out"] = True
        if protocol == "label_logits":
            found["evaluation.arc_labels"] = self.scored["evaluation"]["arc_labels"]
        if limit is not None or data["name"] == "embedded":
            found["data.seed"] = data.get("seed", 0)
        if protocol == "generate":
            found["evaluation.max_new_tokens"] = self.scored["evaluation"].get("max_new_tokens")
        found |= self._partial("test", self.record, data["name"]) | circumstances(self.record)
        if self.method != "none":
            found |= self._training_conditions()
            for name, value in circumstances(self._source()).items():
                if found.get(name) != value:
                    found[f"train.{name}"] = value
        return found

    def _training_conditions(self) -> dict[str, Any]:
        own, data = self.trained["data"], self.scored["data"]
        found = {f"data.{name}": own[name] for name in TRAINING_DATA_FIELDS}
        for name in DATA_FIELDS:
            if own[name] != data[name]:
                found[f"train.data.{name}"] = own[name]
        limited = own["train_limit"] is not None or own["train_limits"]
        if limited or own["name"] == "embedded":
            found["train.data.seed"] = own.get("seed", 0)
        found |= {f"trainer.{name}": self.trained["trainer"][name] for name in TRAINER_FIELDS}
        found["trainer.micro_batch_size"] = self.micro_batch_size
        found["preset"] = self.preset
        return found | self._partial("train", self._source(), own["name"])

    @property
    def micro_batch_size(self) -> int:
        """The size used in training: half of the configured one if memory was insufficient."""
        train = self._source().get("train") or {}
        # Older records contain it only if it was halved.
        used = train.get("micro_batch_size") or train.get("halved_micro_batch")
        return used or self.trained["trainer"]["micro_batch_size"]

    def _partial(self, split: str, record: Mapping[str, Any], source: str) -> dict[str, str]:
        """Return `rows.*` conditions for splits whose files do not have the published number of
        rows."""
        found = {}
        for name, files in record["data"].items():
            task, _, part = name.partition("/")
            rows = sum(file["rows"] for file in files)
            if part == split and source != "embedded" and task in TASKS:
                published = TASKS[task].sizes[split]
                if rows != published:
                    found[f"rows.{name}"] = f"{rows:,} of {published:,}"
        return found

    def hashes(self, task: str) -> tuple[tuple[str, ...], ...]:
        """Return hashes of the files of the task's items, then of each trained task's rows."""
        scored = "train" if self.held_out else "test"
        splits = [self.record["data"][f"{task}/{scored}"]]
        splits += [self._source()["data"][f"{name}/train"] for name in sorted(self.mix)]
        return tuple(tuple(file["sha256"] for file in files) for files in splits)


def _placed(files: RunFiles, force: bool, unplaced: bool) -> RecordedRun:
    record = read_run(files)
    if record.get("status") != "finished":
        raise UserError(f"status={record.get('status')}: the run is not finished")
    reasons = code_objections(record)
    if UNPLACED in reasons and not unplaced:
        raise UserError(UNPLACED)
    if reasons and not (force or files.has(FORCED)):
        raise UserError(f"{'; '.join(reasons)}: collect --force collects it, marked")
    trained = scored = completed(record["config"])
    if (record.get("adapter") or {}).get("trained_by") is not None:
        trained = completed(record["adapter"]["trained_by"]["config"])
    for config in (trained, scored):
        require_complete(config)
    scores = {(score["task"], score["protocol"]): score for score in record["scores"]}
    return RecordedRun(name_of(files.path), files.path, record, trained, scored, scores)


def load_runs(folder: Path) -> tuple[list[RecordedRun], list[LeftOut]]:
    """Return all usable runs in `folder`, packed or not, sorted by name, and the records left out.

    Left out: a record that is truncated, edited, of another version or unfinished; one with
    `code_objections`, unless it was collected by force; one whose predictions contradict its
    accuracies; a folder whose run also exists packed.
    """
    runs, left_out, seen = [], [], set()
    for path in record_paths(folder):
        name = name_of(path)
        try:
            if name in seen:
                raise UserError("it exists twice, as a folder and packed: delete one of the two")
            seen.add(name)
            runs.append(check_run(RunFiles(path)))
        except UserError as error:
            left_out.append(LeftOut(name, str(error)))
    return runs, left_out


def check_run(files: RunFiles, *, force: bool = False, unplaced: bool = False) -> RecordedRun:
    """Read and check one record with its predictions. `force`: ignore objections to its code;
    `unplaced`: take scores of an adapter whose training no record knows.

    Raises:
        UserError: no table can use it; the message has the reason.
    """
    path = files.path
    try:
        if path.suffix != PACKED:
            refuse_links(path, path.parent)
    except ValueError as error:
        raise UserError(str(error)) from error
    with odd_fields(path):
        run = _placed(files, force, unplaced)
        for task, protocol in run.scores:
            run.conditions(protocol)
            run.hashes(task)
        predictions = {key: _read_rows(run, files, *key) for key in run.scores}
    return dataclasses.replace(run, predictions=predictions)


def read_items(run: RecordedRun, task: str, protocol: str, field: str) -> dict[str, float | None]:
    """Item id -> 1.0 (right) or 0.0 for `accuracy` and `accuracy_normalized`, else a field of the
    predictions; None where a line lacks it."""
    rows = run.predictions[task, protocol]
    if field == "accuracy":
        return {key: float(row["prediction"] == row["answer"]) for key, row in rows.items()}
    if field == "accuracy_normalized":
        chosen = {key: row.get("prediction_normalized") for key, row in rows.items()}
        return {
            key: None if choice is None else float(choice == rows[key]["answer"])
            for key, choice in chosen.items()
        }
    return {key: row.get(field) for key, row in rows.items()}


def read_margins(
    run: RecordedRun, task: str, protocol: str
) -> dict[str, tuple[float, bool]] | None:
    """Item id -> (score of the first answer minus that of the second, whether the first is right);
    None unless every item has two answers with a score each."""
    rows = run.predictions[task, protocol].items()
    if any(len(row.get("scores", ())) != 2 for _, row in rows):
        return None
    return {key: (row["scores"][0] - row["scores"][1], row["answer"] == 0) for key, row in rows}


def _row(row: Any) -> dict[str, Any]:
    """Return a line of a predictions file, checked.

    Raises:
        ValueError: a field is missing or has the wrong type.
    """
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise ValueError("a line is not an object with an `id`")
    for name in ("prediction", "answer"):
        if name not in row or not (row[name] is None or type(row[name]) is int):
            raise ValueError(f"{name} of {shown(row['id'], 80)} is not an integer")
    likelihood = row.get(LIKELIHOOD)
    if not (likelihood is None or type(likelihood) in (int, float)):
        raise ValueError(f"{LIKELIHOOD} of {shown(row['id'], 80)} is not a number")
    scores = row.get("scores", [])
    if not (isinstance(scores, list) and all(type(score) in (int, float) for score in scores)):
        raise ValueError(f"scores of {shown(row['id'], 80)} are not numbers")
    return row


def _read_rows(run: RecordedRun, files: RunFiles, task: str, protocol: str) -> Rows:
    """Return the predictions for a task under a protocol.

    Raises:
        UserError: the file is missing or truncated, or contradicts the record's accuracy or hash.
    """
    name, score = predictions_name(task, protocol), run.scores[task, protocol]
    if f"{task}/{protocol}" not in run.record["predictions"]:
        raise UserError(f"{run.name} has no predictions of {task} under {protocol}")
    try:
        content = files.read(name)
        rows = [_row(parse_json(line)) for line in content.splitlines()]
        found = {}
        for row in rows:
            # Some data sets repeat an id.
            key = row["id"] if row["id"] not in found else f"{row['id']}#{len(found)}"
            found[key] = row
        right = sum(row["prediction"] == row["answer"] for row in rows)
    except (OSError, ValueError) as error:
        raise UserError(f"{run.name}: {name} cannot be read ({error})") from error
    if len(rows) != score["n"] or abs(right / score["n"] - score["accuracy"]) > 1e-9:
        raise UserError(f"{run.name}: {name} contradicts the accuracy in its record")
    expected = run.record.get("predictions_sha256", {}).get(f"{task}/{protocol}")
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{run.name}: {name} was changed after it was written")
    return found
