"""Cells and paired differences of runs, with their intervals over items and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mixlora_exp.errors import UserError
from mixlora_exp.results.data_facts import groups, reference
from mixlora_exp.results.runs import RecordedRun, read_items, read_margins
from mixlora_exp.results.statistics.estimates import estimate
from mixlora_exp.results.statistics.parts import TaskMean, accuracy_part, difference_part
from mixlora_exp.results.statistics.two_classes import area_part

ACCURACY = "accuracy"
ACCURACIES = (ACCURACY, "accuracy_normalized")

Side = Mapping[int, Mapping[str, float]]
Runs = Sequence[RecordedRun]


def names_of(runs: Iterable[RecordedRun]) -> tuple[str, ...]:
    """Return the names of runs, each once, in their order."""
    return tuple(dict.fromkeys(run.name for run in runs))


def _side(runs: Runs, task: str, protocol: str, field: str) -> Side | None:
    """Return seed -> item -> value; None without runs or if a value is missing."""
    side = {run.seed: read_items(run, task, protocol, field) for run in runs}
    missing = any(None in items.values() for items in side.values())
    return None if missing or not side else side


def cell(runs: Runs, task: str, protocol: str, field: str = ACCURACY) -> TaskMean | None:
    """Return the accuracy of a cell, by one of `ACCURACIES`; None without runs or if the field is
    missing.

    Raises:
        UserError: its seeds were scored on different items.
    """
    side = _side(runs, task, protocol, field)
    if side is None:
        return None
    try:
        return accuracy_part(side, groups(runs[0], task, protocol))
    except ValueError as error:
        raise _unlike(task, protocol, runs, error) from error


def area(runs: Runs, task: str, protocol: str) -> TaskMean | None:
    """Return the area under the ROC curve of a task with two answers; None for other tasks."""
    found = {run.seed: read_margins(run, task, protocol) for run in runs}
    margins = {seed: rows for seed, rows in found.items() if rows is not None}
    if not margins or len(margins) < len(found):
        return None
    if len({right for _, right in next(iter(margins.values())).values()}) < 2:
        return None
    return area_part(margins, groups(runs[0], task, protocol))


def above(part: TaskMean | None, runs: Runs, task: str, protocol: str) -> bool:
    """Return whether a cell's interval lies above chance and the most frequent answer of
    training."""
    return part is not None and estimate(part).low > reference(runs[0], task, protocol)


def difference(
    runs: Runs, base: Runs, task: str, protocol: str, field: str = ACCURACY
) -> TaskMean | None:
    """Return `runs` minus `base` on one task over their common seeds; None without one or if the
    field is missing. A base model, which has no seed, is used for every seed.

    Raises:
        UserError: they were scored on different items.
    """
    sides = [_side(side, task, protocol, field) for side in (runs, base)]
    if sides[0] is None or sides[1] is None:
        return None
    if base[0].method == "none" and runs[0].method != "none":
        sides[1] = dict.fromkeys(sides[0], next(iter(sides[1].values())))
    try:
        binary = field in ACCURACIES
        clusters = groups(runs[0], task, protocol)
        return difference_part(sides[0], sides[1], clusters, binary=binary)
    except ValueError as error:
        raise _unlike(task, protocol, [*runs, *base], error) from error


def _unlike(task: str, protocol: str, runs: Runs, error: ValueError) -> UserError:
    return UserError(f"{task}, {protocol}: {', '.join(names_of(runs))}: {error}; leave one out")
