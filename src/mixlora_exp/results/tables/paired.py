"""Table entries for paired comparisons of runs on the same items and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixlora_exp.errors import UserError
from mixlora_exp.results.runs import RecordedRun, read_items
from mixlora_exp.results.statistics import Comparison, compare, compare_average
from mixlora_exp.results.tables.parts import Entry, dash, versus

RIGHT = "right"
"""Field of an item to compare: whether it was answered correctly. The other field is `LIKELIHOOD`,
the log-likelihood of the gold answer in nats."""

Side = Mapping[int, Mapping[str, float | None]]


def _sides(
    runs: Sequence[RecordedRun], base: Sequence[RecordedRun], task: str, protocol: str, field: str
) -> tuple[Side, Side] | None:
    """Seed -> item -> value, for both sides; a base model, which has no seed, is used for every
    seed."""
    sides = [
        {run.seed: read_items(run, task, protocol, field) for run in side} for side in (runs, base)
    ]
    if base and base[0].method == "none" and runs and runs[0].method != "none":
        sides[1] = dict.fromkeys(sides[0], next(iter(sides[1].values())))
    if any(None in items.values() for side in sides for items in side.values()):
        return None
    return sides[0], sides[1]


def _names(*sides: Sequence[RecordedRun]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.name for side in sides for run in side))


def _cell(found: Comparison | None, field: str, names: tuple[str, ...]) -> Entry:
    if found is None:
        return dash
    if field == RIGHT:
        return versus(found, names)
    mark = ("better" if found.low > 0 else "worse") if found.clear else ""
    return Entry(
        "versus", found.difference, low=found.low, high=found.high, seeds=found.seeds,
        items=found.items, digits=3, signed=True, mark=mark, records=names,
    )  # fmt: skip


def difference(
    runs: Sequence[RecordedRun],
    base: Sequence[RecordedRun],
    task: str,
    protocol: str,
    field: str = RIGHT,
) -> Entry:
    """`runs` minus `base` on one task; a dash without a common seed or if the field is missing.

    Raises:
        UserError: they were scored on different items.
    """
    sides = _sides(runs, base, task, protocol, field)
    if sides is None:
        return dash
    try:
        return _cell(compare(*sides), field, _names(runs, base))
    except ValueError as error:
        names = ", ".join(_names(runs, base))
        raise UserError(f"{task}, {protocol}: {names}: {error}; leave one out") from error


def average_difference(
    runs: Mapping[str, Sequence[RecordedRun]],
    base: Mapping[str, Sequence[RecordedRun]],
    tasks: Sequence[str],
    protocol: str,
    field: str = RIGHT,
) -> Entry:
    """`runs` minus `base` (both by task), averaged over `tasks`; a dash if a task is missing."""
    pairs = []
    for task in tasks:
        sides = _sides(runs.get(task, ()), base.get(task, ()), task, protocol, field)
        if sides is None:
            return dash
        pairs.append(sides)
    names = _names(*(side.get(task, ()) for task in tasks for side in (runs, base)))
    return _cell(compare_average(pairs), field, names)
