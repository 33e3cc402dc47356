"""Lines of Tables 1, 2, 5, 8 and 9: accuracies, averages and differences of runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.results.cells import Standards, deviations
from mixlora_exp.results.data_facts import reference
from mixlora_exp.results.paper import METHOD_TITLES, TOLERANCE, PaperTable
from mixlora_exp.results.runs import LIKELIHOOD, RecordedRun
from mixlora_exp.results.statistics.estimates import compare, estimate
from mixlora_exp.results.statistics.parts import TaskMean
from mixlora_exp.results.tables.paired import (
    ACCURACIES,
    ACCURACY,
    above,
    area,
    cell,
    difference,
    names_of,
)
from mixlora_exp.results.tables.parts import (
    REFERENCE,
    Entry,
    Row,
    dash,
    number,
    ours,
    paper,
    versus,
)
from mixlora_exp.results.tables.variants import BASE, AccuracySpec, Members, Variant

FURTHER = {
    "ours, normalised": "accuracy_normalized",
    "log-likelihood of the gold answer": LIKELIHOOD,
    "unparsed answers": "unparsed",
}
"""Title of a further line -> the field of a score that it shows."""
AREA = "area under the ROC curve"


@dataclass(frozen=True, slots=True)
class Context:
    """Values that the lines of a block share. `above`: the tasks on which its runs are above
    chance."""

    spec: AccuracySpec
    protocol: str
    members: Mapping[Variant, Members]
    above: frozenset[str]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Columns of the table."""
        return self.spec.tasks


def tasks_above_chance(
    tasks: Sequence[str], protocol: str, runs: Iterable[RecordedRun], standards: Standards
) -> frozenset[str]:
    """Return tasks on which more than half of the trained settings lie above chance and the most
    frequent answer of training. `runs`: all of a block, whatever table shows them, so that two
    tables of one block leave out the same tasks."""
    settings: dict[str, dict[str, list[RecordedRun]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.method != "none":
            odd = deviations(run, standards)
            key = json.dumps([run.method, run.preset, odd, sorted(run.mix)], sort_keys=True)
            for task in run.mix:
                if (task, protocol) in run.scores:
                    settings[key][task].append(run)
    found = []
    for task in tasks:
        lines = [by_task[task] for by_task in settings.values() if task in by_task]
        higher = [above(cell(runs, task, protocol), runs, task, protocol) for runs in lines]
        if 2 * sum(higher) > len(higher) or not lines:
            found.append(task)
    return frozenset(found)


def _averages(context: Context) -> tuple[list[str], list[str]]:
    """Return the tasks of the two averages: all, and those above chance."""
    return [*context.tasks], [task for task in context.tasks if task in context.above]


def line(label: tuple[str, ...], members: Members, context: Context, field: str = ACCURACY) -> Row:
    """Return one field of a score on each task, and its averages over the cells that the line
    shows; a dash if one is missing, because an average over fewer tasks is not comparable."""
    if field in ACCURACIES:
        return _accuracies(label, members, context, field)
    values = {task: _mean(members.get(task, ()), task, context.protocol, field)
              for task in context.tasks}  # fmt: skip
    digits = 0 if field == "unparsed" else 2

    def entry(tasks: Sequence[str]) -> Entry:
        known = [values[task] for task in tasks]
        if None in known or not known:
            return dash
        runs = [run for task in tasks for run in members[task]]
        return number(mean(v for v in known if v is not None), digits, names_of(runs))

    cells = [entry([task]) for task in context.tasks]
    return Row(label, (dash, *cells, *map(entry, _averages(context))))


def _mean(runs: Sequence[RecordedRun], task: str, protocol: str, field: str) -> float | None:
    values = [run.scores[task, protocol].get(field) for run in runs]
    return None if None in values or not values else mean(values)


def _accuracies(label: tuple[str, ...], members: Members, context: Context, field: str) -> Row:
    protocol = context.protocol
    parts = {task: cell(members.get(task, ()), task, protocol, field) for task in context.tasks}

    def entry(tasks: Sequence[str]) -> Entry:
        known = [part for task in tasks if (part := parts[task]) is not None]
        if len(known) < len(tasks) or not known:
            return dash
        found = estimate(*known)
        level = mean(reference(members[task][0], task, protocol) for task in tasks)
        runs = [run for task in tasks for run in members[task]]
        return ours(found, names_of(runs), at_chance=found.low <= level)

    cells = [entry([task]) for task in context.tasks]
    return Row(label, (dash, *cells, *map(entry, _averages(context))))


def _areas(label: tuple[str, ...], members: Members, context: Context) -> Iterator[Row]:
    """Yield the line of the area under the curve, if the table has a task with two answers."""
    cells = []
    for task in context.tasks:
        runs = members.get(task, ())
        part = area(runs, task, context.protocol)
        found = None if part is None else estimate(part)
        cells.append(
            dash if found is None else ours(found, names_of(runs), at_chance=found.low <= 0.5)
        )
    if any(entry.value is not None for entry in cells):
        yield Row(label, (dash, *cells, dash, dash))


def minus(label: tuple[str, ...], first: Row, second: Row) -> Row:
    """Return `first` minus `second` per entry, without the parameter column. `second` is the
    paper's line and has no interval, so the interval is that of `first`."""
    cells = [dash]
    for a, b in zip(first.cells[1:], second.cells[1:], strict=True):
        if a.value is None or b.value is None:
            cells.append(dash)
            continue
        low, high = (None if v is None else v - b.value for v in (a.low, a.high))
        value, records = a.value - b.value, tuple(dict.fromkeys(a.records + b.records))
        cells.append(
            Entry(
                "difference", value, low=low, high=high, seeds=a.seeds, signed=True, records=records
            )
        )  # fmt: skip
    return Row(label, tuple(cells))


def compared(
    label: tuple[str, ...],
    members: Members,
    baseline: Members,
    context: Context,
    field: str = ACCURACY,
) -> Iterator[Row]:
    """Yield the line of a paired comparison on the same items and seeds; none if it is not
    possible. A difference between cells that are both at chance is at chance, and so is an average
    over one."""
    protocol, parts, at_chance = context.protocol, {}, {}
    for task in context.tasks:
        runs, base = members.get(task, ()), baseline.get(task, ())
        parts[task] = difference(runs, base, task, protocol, field)
        if parts[task] is not None and field == ACCURACY:
            at_chance[task] = not any(
                above(cell(side, task, protocol), side, task, protocol) for side in (runs, base)
            )

    def entry(tasks: Sequence[str]) -> Entry:
        known: list[TaskMean] = [part for task in tasks if (part := parts[task]) is not None]
        if len(known) < len(tasks) or not known:
            return dash
        records = names_of(
            run for task in tasks for side in (members, baseline) for run in side[task]
        )
        any_at_chance = any(at_chance.get(task, False) for task in tasks)
        return versus(compare(*known), records, nats=field == LIKELIHOOD, at_chance=any_at_chance)

    cells = [entry([task]) for task in context.tasks]
    if any(found.kind != "dash" for found in cells):
        yield Row(label, (dash, *cells, *map(entry, _averages(context))))


def further(variant: Variant, context: Context) -> Iterator[Row]:
    """Yield further statistics of a line with results, and its differences to LoRA, to the default
    value of the varied setting, and to the base model."""
    members, spec = context.members, context.spec
    for title, field in FURTHER.items():
        found = line((*variant.label, title), members[variant], context, field)
        if any(entry.value is not None for entry in found.cells):
            yield found
    yield from _areas((*variant.label, AREA), members[variant], context)
    others = {"LoRA": Variant("lora", variant.setup, variant.value), "the base model": BASE}
    if spec.default:
        others = {spec.default: Variant(variant.method, variant.setup, spec.default), **others}
    for title, other in others.items():
        if other == variant or other not in members:
            continue
        for name, field in (
            (f"minus {title}", ACCURACY),
            (f"log-likelihood minus {title}", LIKELIHOOD),
        ):
            label = (*variant.label, name)
            yield from compared(label, members[variant], members[other], context, field)


def single_multi(
    printed: PaperTable,
    lines: Mapping[Variant, tuple[Row | None, Row]],
    context: Context,
) -> Iterator[Row]:
    """Yield lines for MT minus ST: printed by the paper, recomputed from its figures, and ours."""
    spec, members = context.spec, context.members
    if "MT" not in spec.setups or "ST" not in spec.setups:
        return
    for method in PAPER_METHODS:
        title, (single, multi) = METHOD_TITLES[method], (Variant(method, s) for s in ("ST", "MT"))
        given = lines.get(single), lines.get(multi)
        if given[0] is not None and given[1] is not None and given[0][0] and given[1][0]:
            recomputed = minus(
                (title, "MT minus ST", "paper, recomputed"), given[1][0], given[0][0]
            )
            shown = printed.differences.get(method)
            if shown is not None:
                columns = (*spec.tasks, "avg")
                cells = [
                    paper(shown[n], mark="" if _agree(shown[n], found.value) else "†")
                    for n, found in zip(columns, recomputed.cells[1:-1], strict=True)
                ]
                yield Row((title, "MT minus ST", "paper, printed"), (dash, *cells, dash))
            yield recomputed
        if single in members and multi in members:
            for name, field in (("ours", ACCURACY), ("log-likelihood", LIKELIHOOD)):
                label = (title, "MT minus ST", name)
                yield from compared(label, members[multi], members[single], context, field)


def _agree(printed: str, computed: float | None) -> bool:
    # Both figures are rounded to half a unit of the last digit.
    return computed is not None and abs(float(printed) - computed) <= TOLERANCE


def baselines(context: Context) -> Iterator[Row]:
    """Yield lines for the base model, the most frequent answers and chance, from any run on the
    same items."""
    members = context.members
    if BASE in members:
        yield line(("base model", "-", "ours"), members[BASE], context)
        likelihood = ("base model", "-", "log-likelihood of the gold answer")
        yield line(likelihood, members[BASE], context, LIKELIHOOD)
        yield from _areas(("base model", "-", AREA), members[BASE], context)
    one: dict[str, Sequence[RecordedRun]] = {}
    for by_task in members.values():
        for task, runs in by_task.items():
            one.setdefault(task, runs[:1])
    for title, field in (
        ("majority class", "majority_class"),
        ("chance", "chance"),
        (REFERENCE, ""),
    ):
        yield _plain(title, field, one, context)


def _plain(title: str, field: str, one: Members, context: Context) -> Row:
    values = {
        task: 100
        * (
            runs[0].scores[task, context.protocol][field]
            if field
            else reference(runs[0], task, context.protocol)
        )
        for task, runs in one.items()
    }

    def entry(tasks: Sequence[str]) -> Entry:
        if not tasks or any(task not in values for task in tasks):
            return dash
        records = names_of(one[task][0] for task in tasks)
        return number(mean(values[task] for task in tasks), records=records)

    cells = [entry([task]) for task in context.tasks]
    return Row((title, "-", ""), (dash, *cells, *map(entry, _averages(context))))
