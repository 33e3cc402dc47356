"""Every cell of every table: done, running, interrupted, failed or missing, and what it would take.

Read from the experiment files, the records and the run folders; nothing is computed or locked.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_exp.config import (
    CONF_DIR,
    Config,
    fingerprint,
    fingerprint_of,
    open_session,
    plan_runs,
    run_name,
)
from mixlora_exp.config.parameters import count_parameters
from mixlora_exp.config.schema import LoraMethodConfig
from mixlora_exp.errors import UserError
from mixlora_exp.planning import BOOLQ_PASSAGE, CHARACTERS, CHARACTERS_PER_TOKEN, memory_of
from mixlora_exp.results.runs import filled
from mixlora_exp.runlock import holder_of
from mixlora_exp.tasks import TASKS

__all__ = ["STATES", "Cell", "experiments", "find_cells", "gpu_hours"]

STATES = ("done", "running", "interrupted", "failed", "missing")
FLOPS_PER_SECOND = 1e14
"""Of one GPU in bf16, about a third of an A100's peak: an assumption, not a measurement."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of an experiment. `detail`: its record, who works on it, how far it is, or why it
    failed; `command` runs it alone."""

    experiment: str
    name: str
    overrides: str
    state: str
    detail: str
    hours: float
    memory_gib: float
    command: str


def experiments() -> list[str]:
    """The sweeps that make the paper's tables and figures, by the names that are typed."""
    files = [f for kind in ("table", "figure") for f in CONF_DIR.glob(f"experiment/{kind}*/*.yaml")]
    return sorted(f"{path.parent.name}/{path.stem}" for path in files)


def _example_tokens(config: Config, task: str, form: str) -> float:
    if task not in CHARACTERS:
        return config.data.cutoff_length / 2
    characters = CHARACTERS[task][0 if form == "label" else 1]
    if task == "boolq" and not config.data.boolq_passage:
        characters -= BOOLQ_PASSAGE
    return min(characters / CHARACTERS_PER_TOKEN + 2, config.data.cutoff_length)


def _rows(task: str, split: str, limit: int | None) -> int:
    size = TASKS[task].sizes[split] if task in TASKS else 1000
    return min(size, limit or size)


def gpu_hours(config: Config) -> float:
    """An estimate: twice the parameters per token and pass, one pass forward and one backward for
    training (frozen weights have no gradient), and one forward for each scored item."""
    counted = count_parameters(config.model, config.method)
    size = counted.base + counted.trainable
    tokens = 0.0
    if isinstance(config.method, LoraMethodConfig):
        rows = {t: _rows(t, "train", config.data.train_limit) for t in config.task.train}
        epoch = sum(
            n * _example_tokens(config, task, form.value)
            for task, n in rows.items()
            for form in config.data.forms
        )
        passes = config.trainer.epochs
        if config.trainer.max_steps is not None:
            examples = sum(rows.values()) * len(config.data.forms)
            steps = math.ceil(examples / config.trainer.batch_size)
            passes = config.trainer.max_steps / max(steps, 1)
        tokens += 2 * passes * epoch
    for task in config.task.evaluate:
        items = _rows(task, "test", config.evaluation.limit)
        tokens += items * len(config.evaluation.protocols) * _example_tokens(config, task, "label")
    return 2 * size * tokens / FLOPS_PER_SECOND / 3600


def _kept(records: Path) -> dict[str, Path]:
    """Committed records by the fingerprint that their run has today."""
    found = {}
    for path in sorted(records.glob("*/record.json")):
        try:
            settings = json.loads(path.read_text())["config"]
            found[fingerprint_of(filled(settings))] = path
        except (OSError, ValueError, KeyError, TypeError):
            continue  # `make tables` says what is wrong with it.
    return found


def _state(folder: Path, kept: Path | None) -> tuple[str, str]:
    """State and detail of the run with this folder; `kept` is its committed record."""
    record = kept or folder / "record.json"
    if record.is_file():
        return "done", os.path.relpath(record)
    holder = holder_of(folder / "lock")
    if holder is not None:
        return "running", f"{holder.get('host')}, process {holder.get('pid')}"
    try:
        failure = json.loads((folder / "failure.json").read_text())
        return "failed", str(failure["error"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    steps = sorted((folder / "checkpoints").glob("step-*"))
    if steps:
        return "interrupted", f"after step {int(steps[-1].name.removeprefix('step-'))}"
    return "missing", ""


def find_cells(names: Sequence[str], overrides: Sequence[str], records: Path) -> Iterator[Cell]:
    """The cells of experiments under further overrides. `records`: the folder of committed ones.

    Raises:
        UserError: there is no such experiment, or an override is not valid.
    """
    known, kept = experiments(), _kept(records)
    with open_session() as session:
        for name in names:
            if name not in known:
                raise UserError(f"experiment={name} is unknown: choose from {', '.join(known)}")
            plan = plan_runs(session, "config", [f"experiment={name}", *overrides], False)
            for cell in plan.cells:
                record = kept.get(fingerprint(cell.config))
                yield _cell(name, cell.overrides, cell.config, record, overrides)


def _cell(
    experiment: str,
    lines: Sequence[str],
    config: Config,
    record: Path | None,
    typed: Sequence[str],
) -> Cell:
    run = run_name(config)
    folder = Path(config.output_dir).expanduser() / run
    state, detail = _state(folder, record)
    own = [line for line in lines if line not in typed and not line.startswith("experiment=")]
    memory: dict[str, Any] = memory_of(config)
    return Cell(
        experiment,
        run,
        " ".join(own),
        state,
        detail,
        gpu_hours(config),
        sum(memory.values()) / 2**30,
        " ".join(["python train.py -m", f"experiment={experiment}", *own, *typed]),
    )
