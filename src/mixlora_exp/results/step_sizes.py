"""Part A of docs/comparison.md: LoRA and MixLoRA, each at the best of three step sizes.

What is decided here was written down before the runs: which runs count, how a step size is chosen
on rows held out of training, and which differences are compared.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import Any

from mixlora_exp.config.command import compose
from mixlora_exp.config.resolve import to_dict
from mixlora_exp.results.cells import Standards, deviations
from mixlora_exp.results.runs import (
    DATA_FIELDS,
    MODEL_FIELDS,
    TRAINER_FIELDS,
    TRAINING_DATA_FIELDS,
    RecordedRun,
)
from mixlora_exp.results.statistics.parts import TaskMean
from mixlora_exp.results.tables.paired import cell

METHODS = ("lora", "mixlora")
MODEL = "smollm2_135m"
TASKS = ("arc_e", "arc_c", "obqa", "piqa")
SEEDS = (42, 43, 44)
PROTOCOL, METRIC = "answer_text", "accuracy_normalized"
HELD_OUT_LIMIT = 500
"""Most held-out rows of a task that are scored."""
CLOSE = 0.002
"""Step sizes whose accuracy on held-out rows is at most this far below the highest count as equal,
and the smallest of them is chosen."""


@dataclass(frozen=True, slots=True, order=True)
class StepSize:
    """How far a step moves a layer's output early in training: alpha times the learning rate."""

    alpha: float
    rate: float

    def __str__(self) -> str:
        # As it is given: 2e-4, not 2e-04 or 0.0002.
        return f"alpha {self.alpha:g}, rate {self.rate:.0e}".replace("e-0", "e-")

    @property
    def size(self) -> float:
        """Return alpha times the learning rate."""
        return self.alpha * self.rate


STEPS = tuple(
    sorted((StepSize(32, 2e-4), StepSize(160, 2e-4), StepSize(160, 6e-4)), key=lambda s: s.size)
)


@dataclass(frozen=True, slots=True)
class StepCell:
    """The runs of one method at one step size, one per seed: `tested` on the full test sets,
    `held_out` on rows of the training split that no run is trained on."""

    method: str
    step: StepSize
    tested: Sequence[RecordedRun]
    held_out: Sequence[RecordedRun]

    def parts(self, metric: str = METRIC, *, held_out: bool = False) -> list[TaskMean]:
        """Return the accuracy on each task.

        Raises:
            UserError: its seeds were scored on different items.
        """
        runs = self.held_out if held_out else self.tested
        found = [cell(runs, task, PROTOCOL, metric) for task in TASKS]
        return [part for part in found if part is not None]

    @property
    def chosen_by(self) -> float:
        """Return the mean over tasks and seeds of the metric on held-out rows, as a fraction."""
        return mean(part.value for part in self.parts(held_out=True))


StepCells = Mapping[tuple[str, StepSize], StepCell]


Place = tuple[str, StepSize, int]
"""(method, step size, seed)"""


@dataclass(frozen=True, slots=True)
class Progress:
    """The design's runs that are there, on the test sets and on held-out rows; `cells` is empty
    until all of them are."""

    tested: Mapping[Place, RecordedRun]
    held_out: Mapping[Place, RecordedRun]
    cells: StepCells
    total: int = len(METHODS) * len(STEPS) * len(SEEDS)

    @property
    def complete(self) -> bool:
        """Return whether every run of the design is there."""
        return bool(self.cells)


@cache
def _expected() -> dict[str, Any]:
    """Return the conditions that a run of the design has, but for its step size, its data source
    and its machine: those of `experiment=study/step_size`, in full."""
    config = to_dict(compose(["experiment=study/step_size", "hydra.mode=RUN", "data.path=."]))
    fields = {
        "model": MODEL_FIELDS,
        "data": (*DATA_FIELDS, *TRAINING_DATA_FIELDS),
        "trainer": TRAINER_FIELDS,
    }
    found = {f"{group}.{n}": config[group][n] for group, names in fields.items() for n in names}
    found |= {"precision": "bfloat16", "kernel": "exact", "preset": "correct"}
    found |= {"evaluation.dropout": False, "train.data.seed": 0}
    return {n: v for n, v in found.items() if n not in FREE}


FREE = ("data.name", "trainer.learning_rate")
MACHINE = ("hardware", "torch", "train.hardware", "train.torch")


def _belongs(run: RecordedRun, standards: Standards) -> bool:
    if not (
        run.model == MODEL
        and run.method in METHODS
        and run.seed in SEEDS
        and sorted(run.mix) == sorted(TASKS)
        and step_size(run) in STEPS
        and deviations(run, standards).keys() <= {"alpha"}
        and all((task, PROTOCOL) in run.scores for task in TASKS)
    ):
        return False
    found = {n: v for n, v in run.conditions(PROTOCOL).items() if n not in (*FREE, *MACHINE)}
    wanted = {**_expected(), "evaluation.limit": HELD_OUT_LIMIT if run.held_out else None}
    if run.held_out:
        wanted |= {"evaluation.held_out": True, "data.seed": 0}
    # What only some runs have, such as shuffled experts or files cut short, is in no design.
    return _plain(found) == _plain(wanted)


def _plain(value: Any) -> Any:
    """Return a setting with lists for tuples, so that records and configurations compare equal."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def step_size(run: RecordedRun) -> StepSize:
    """Return the step size of a trained run."""
    return StepSize(run.trained["method"]["alpha"], run.trained["trainer"]["learning_rate"])


def _shared(run: RecordedRun) -> str:
    """Return what all runs of the design have in common, the code included."""
    found = run.conditions(PROTOCOL)
    del found["trainer.learning_rate"]
    files = {task: run.hashes(task) for task in TASKS}
    code = run.record.get("code")
    return json.dumps({**found, "files": files, "code": code}, sort_keys=True)


def _largest(runs: Sequence[RecordedRun]) -> dict[Place, RecordedRun]:
    """Return the runs by method, step size and seed, of the largest group that shares all other
    conditions (`conditions`, hashes of the files, hash of the code): one comparison never mixes two
    of them."""
    groups: dict[str, dict[Place, RecordedRun]] = defaultdict(dict)
    for run in runs:
        groups[_shared(run)].setdefault((run.method, step_size(run), run.seed), run)
    # Of equal size: the same one each time, whatever the names of the runs.
    best = max(groups, key=lambda key: (len(groups[key]), key), default=None)
    return {} if best is None else groups[best]


def _weights(run: RecordedRun, part: str) -> str | None:
    return (run.record.get(part) or {}).get("sha256")


def read_cells(runs: Sequence[RecordedRun], standards: Standards) -> Progress:
    """Return the cells of the design among `runs`, none of them until all are there."""
    known = [run for run in runs if _belongs(run, standards)]
    tested = _largest([run for run in known if not (run.held_out or run.rescored)])
    adapters = {_weights(run, "saved_adapter"): place for place, run in tested.items()}
    held = _largest([run for run in known if run.held_out and _weights(run, "adapter") in adapters])
    total = len(METHODS) * len(STEPS) * len(SEEDS)
    if min(len(tested), len(held)) < total:
        return Progress(tested, held, {})
    cells = {
        (method, step): StepCell(method, step, *(
            tuple(found[method, step, seed] for seed in SEEDS) for found in (tested, held)
        ))
        for method in METHODS
        for step in STEPS
    }  # fmt: skip
    return Progress(tested, held, cells)


def choose(cells: StepCells, method: str) -> StepCell:
    """Return the cell whose step size has the highest accuracy on held-out rows, the smallest of
    those that are at most `CLOSE` below it. Test items play no part."""
    own = [cells[method, step] for step in STEPS]
    highest = max(one.chosen_by for one in own)
    # What is on the limit belongs to it, whatever the rounding.
    return next(one for one in own if one.chosen_by >= highest - CLOSE - 1e-12)


@dataclass(frozen=True, slots=True)
class Pair:
    """`first` minus `second`; `label`: (method, setting, subtracted). `primary`: the one comparison
    that decides; the others are corrected together."""

    label: tuple[str, str, str]
    first: StepCell
    second: StepCell
    primary: bool = False


def pairs(cells: StepCells, titles: Mapping[str, str]) -> Iterator[Pair]:
    """Yield the primary comparison, then the five secondary ones."""
    plain, mixed = (titles[method] for method in METHODS)
    best = {method: choose(cells, method) for method in METHODS}
    label = (mixed, "each at its own best step size", f"minus {plain}")
    yield Pair(label, best["mixlora"], best["lora"], primary=True)
    for step in STEPS:
        yield Pair(
            (mixed, f"both at {step}", f"minus {plain}"), cells["mixlora", step],
            cells["lora", step],
        )  # fmt: skip
    for method in METHODS:
        label = (titles[method], f"{STEPS[-1]} minus {STEPS[0]}", "")
        yield Pair(label, cells[method, STEPS[-1]], cells[method, STEPS[0]])
