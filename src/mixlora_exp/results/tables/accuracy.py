"""Lines and blocks of Tables 1, 2, 5, 8 and 9: accuracies of the paper and of the records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean

from mixlora_exp.results.cells import Key, Standards, block_title
from mixlora_exp.results.paper import (
    METHOD_TITLES,
    METHODS,
    MODEL_TITLES,
    TASK_TITLES,
    TOLERANCE,
    Contradiction,
    PaperTable,
    contradictions,
    line_id,
    read_paper,
)
from mixlora_exp.results.runs import LIKELIHOOD, RecordedRun
from mixlora_exp.results.statistics import estimate, estimate_average
from mixlora_exp.results.tables.paired import RIGHT, average_difference, difference
from mixlora_exp.results.tables.parts import Block, Entry, Row, dash, number, ours, paper
from mixlora_exp.results.tables.registry import PAPER, Made, Sources

STUB = ("method", "setup", "row")
FURTHER = {
    "ours, normalised": "accuracy_normalized",
    "log-likelihood of the gold answer": "gold_log_likelihood",
    "unparsed answers": "unparsed",
}
"""Title of a further line -> the field of a score that it shows."""

NOTES = (
    "Ours: mean over n seeds; in brackets the 95 % interval, over items (Wilson) or over seeds "
    "(Student's t), whichever is wider; one seed says nothing about others. A dash was not run. "
    "#Params: printed by the paper; computed exactly from the shapes in the paper's denominator "
    "(magnitudes left out), and of all weights (magnitudes counted).",
    "Minus LoRA: the same items and seeds, paired bootstrap over items, widened to Student's "
    "interval where there are several seeds; better or worse stands only where the interval leaves "
    "out zero. The log-likelihood of the gold answer (nats, mean over items) "
    "moves also where accuracy stays at chance.",
    "Results under other conditions than the paper's (fewer rows, a limit on items, another source "
    "of data, another protocol) stand in blocks of their own, and their conditions over them.",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """Identity of a line: method, setup (ST: single-task; otherwise the mixture's name), and the
    value of the setting that the table varies."""

    method: str
    setup: str
    value: str = ""

    @property
    def label(self) -> tuple[str, str]:
        title = METHOD_TITLES[self.method]
        return (f"{title} {self.value}".strip(), self.setup)


BASE = Variant("none", "-")
PAPER_PROTOCOL = "label_logits"
"""The paper's protocol; differences from its figures are only meaningful under it."""


@dataclass(frozen=True, slots=True)
class AccuracySpec:
    """Selection of runs and lines for one of the tables.

    `setups`: name of a setup -> whether trained tasks belong to it, given the scored task.
    `varied(run, standards)`: the run's value of the setting that the table varies; None for a run
    that does not belong to the table.
    """

    tasks: tuple[str, ...]
    setups: Mapping[str, Callable[[tuple[str, ...], str], bool]]
    varied: Callable[[RecordedRun, Standards], str | None]
    paper_key: Callable[[str, Variant], dict[str, str] | None]
    models: tuple[str, ...]
    values: tuple[str, ...] = ("",)
    methods: tuple[str, ...] = METHODS
    others: bool = True
    """True if the table includes models that are not in the paper."""
    params: Callable[[str, Variant], tuple[float, float] | None] = lambda model, variant: None


def _variants(spec: AccuracySpec) -> Iterator[Variant]:
    for method, value, setup in product(spec.methods, spec.values, spec.setups):
        yield Variant(method, setup, value)


def _members(
    spec: AccuracySpec, runs: Sequence[RecordedRun], standards: Standards
) -> dict[Variant, dict[str, list[RecordedRun]]]:
    """Runs by line and task."""
    found: dict[Variant, dict[str, list[RecordedRun]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for task in {task for task, _ in run.scores}:
            if task not in spec.tasks:
                continue
            if run.method == "none":
                found[BASE][task].append(run)
                continue
            value = spec.varied(run, standards)
            for setup, belongs in spec.setups.items():
                if value is not None and belongs(run.mix, task):
                    found[Variant(run.method, setup, value)][task].append(run)
    return found


def _names(runs: Iterable[RecordedRun]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.name for run in runs))


def _cell(runs: Sequence[RecordedRun], task: str, protocol: str, field: str) -> Entry:
    if not runs:
        return dash
    scores = [run.scores[task, protocol] for run in runs]
    if any(score.get(field) is None for score in scores):
        return dash
    if field in ("accuracy", "accuracy_normalized"):
        return ours(estimate([s[field] for s in scores], scores[0]["n"]), _names(runs))
    value = mean(score[field] for score in scores)
    return number(value, 0 if field == "unparsed" else 2, _names(runs))


def _average(
    members: Mapping[str, list[RecordedRun]], tasks: Sequence[str], protocol: str, field: str
) -> Entry:
    """The average over all tasks of the table; a dash if one is missing, because an average over
    fewer tasks is not comparable."""
    if any(not members.get(task) for task in tasks):
        return dash
    by_task = {t: {run.seed: run.scores[t, protocol] for run in members[t]} for t in tasks}
    seeds = sorted(set.intersection(*(set(scores) for scores in by_task.values())))
    scores = [[by_task[task][seed] for seed in seeds] for task in tasks]
    if not seeds or any(score.get(field) is None for row in scores for score in row):
        return dash
    names = _names(run for task in tasks for run in members[task] if run.seed in seeds)
    if field in ("accuracy", "accuracy_normalized"):
        values = [[score[field] for score in row] for row in scores]
        return ours(estimate_average(values, [row[0]["n"] for row in scores]), names)
    value = mean(mean(score[field] for score in row) for row in scores)
    return number(value, 0 if field == "unparsed" else 2, names)


def _line(
    label: tuple[str, ...],
    members: Mapping[str, list[RecordedRun]],
    spec: AccuracySpec,
    protocol: str,
    field: str,
) -> Row:
    cells = [_cell(members.get(task, []), task, protocol, field) for task in spec.tasks]
    return Row(label, (dash, *cells, _average(members, spec.tasks, protocol, field)))


def _difference(label: tuple[str, ...], first: Row, second: Row) -> Row:
    """`first` minus `second` per entry, without the parameter column. `second` is the paper's line
    and has no interval, so the interval is that of `first`."""
    cells = [dash]
    for a, b in zip(first.cells[1:], second.cells[1:], strict=True):
        if a.value is None or b.value is None:
            cells.append(dash)
            continue
        low, high = (None if v is None else v - b.value for v in (a.low, a.high))
        value, records = a.value - b.value, tuple(dict.fromkeys(a.records + b.records))
        cells.append(Entry("difference", value, low=low, high=high, signed=True, records=records))
    return Row(label, tuple(cells))


def _versus(
    label: tuple[str, ...],
    members: Mapping[str, list[RecordedRun]],
    baseline: Mapping[str, list[RecordedRun]],
    spec: AccuracySpec,
    protocol: str,
    field: str = RIGHT,
) -> Iterator[Row]:
    """The line of a paired comparison on the same items and seeds; none if it is not possible."""
    cells = [
        difference(members.get(task, ()), baseline.get(task, ()), task, protocol, field)
        for task in spec.tasks
    ]
    if any(cell.value is not None for cell in cells):
        average = average_difference(members, baseline, spec.tasks, protocol, field)
        yield Row(label, (dash, *cells, average))


def _counted(
    spec: AccuracySpec, model: str, variant: Variant, runs: Iterable[RecordedRun]
) -> tuple[float, float] | None:
    """#Params as (percent of the paper's denominator, percent of all weights): from the records,
    None if they differ; without records, computed from conf/model."""
    counts = [run.parameters for run in runs]
    if None in counts:
        return None
    found = {(p.get("percent_paper") or 0.0, p.get("percent_true")) for p in counts}
    if not found or variant.method == "none":
        return spec.params(model, variant)
    counted = found.pop() if len(found) == 1 else (0.0, None)
    return None if counted[1] is None else counted


def _params(
    spec: AccuracySpec,
    model: str,
    variant: Variant,
    printed: str | None,
    runs: Iterable[RecordedRun],
) -> tuple[Entry, Entry]:
    counted = _counted(spec, model, variant, runs)
    if counted is None:
        return paper(printed), dash
    paper_percent, true_percent = counted
    text = f"{true_percent:.3f} of all"
    if paper_percent:
        text = f"{paper_percent:.3f}; {text}"
    return paper(printed), Entry("text", text=text)


def _block(
    spec: AccuracySpec,
    model: str,
    printed: PaperTable,
    heading: str,
    protocol: str,
    members: Mapping[Variant, Mapping[str, list[RecordedRun]]],
    beside_paper: bool,
    known: Sequence[Contradiction],
) -> Block:
    rows: list[Row] = []
    # A setup with results for one method is shown for all methods, with dashes.
    setups = {variant.setup for variant in members if variant.method != "none"}
    marked = {(c.line, c.column) for c in known if c.line is not None}
    extra = set(members) - set(_variants(spec)) - {BASE}
    order = [*_variants(spec), *sorted(extra, key=lambda v: (v.method, v.setup, v.value))]
    lines: dict[Variant, tuple[Row | None, Row]] = {}
    for variant in order:
        runs = [run for found in members.get(variant, {}).values() for run in found]
        key = spec.paper_key(model, variant)
        line = printed.line(**key) if key else None
        from_paper = None
        if line is not None and beside_paper:
            marks = [(line_id(line), task) in marked for task in (*spec.tasks, "avg")]
            printed_cells = [line[task] for task in (*spec.tasks, "avg")]
            cells = [paper(v, mark="†" * m) for v, m in zip(printed_cells, marks, strict=True)]
            own, counted = _params(spec, model, variant, line.get("params_pct"), runs)
            from_paper = Row((*variant.label, "paper"), (own, *cells))
        else:
            _, counted = _params(spec, model, variant, None, runs)
        if from_paper is None and variant.setup not in setups:
            continue
        found = _line(
            (*variant.label, "ours"), members.get(variant, {}), spec, protocol, "accuracy"
        )
        found = Row(found.label, (counted, *found.cells[1:]))
        lines[variant] = (from_paper, found)
        rows += [found] if from_paper is None else [from_paper, found]
        if variant not in members:
            continue
        if from_paper is not None and protocol == PAPER_PROTOCOL:
            rows.append(_difference((*variant.label, "ours minus paper"), found, from_paper))
        rows += _further(spec, variant, members, protocol)
    rows += _single_multi(spec, printed, model, lines, members, protocol)
    rows += _baselines(spec, members, protocol)
    columns = ("#Params (%)", *(TASK_TITLES[task] for task in spec.tasks), "average")
    return Block(heading, STUB, columns, tuple(rows), run=bool(members))


def _further(
    spec: AccuracySpec,
    variant: Variant,
    members: Mapping[Variant, Mapping[str, list[RecordedRun]]],
    protocol: str,
) -> Iterator[Row]:
    """Further statistics of a line with results."""
    for title, field in FURTHER.items():
        line = _line((*variant.label, title), members[variant], spec, protocol, field)
        if any(cell.value is not None for cell in line.cells):
            yield line
    others = {"LoRA": Variant("lora", variant.setup, variant.value), "the base model": BASE}
    for title, other in others.items():
        if other == variant or other not in members:
            continue
        for name, field in (
            (f"minus {title}", RIGHT),
            (f"log-likelihood minus {title}", LIKELIHOOD),
        ):
            label = (*variant.label, name)
            yield from _versus(label, members[variant], members[other], spec, protocol, field)


def _single_multi(
    spec: AccuracySpec,
    printed: PaperTable,
    model: str,
    lines: Mapping[Variant, tuple[Row | None, Row]],
    members: Mapping[Variant, Mapping[str, list[RecordedRun]]],
    protocol: str,
) -> Iterator[Row]:
    """Lines for MT minus ST: printed by the paper, recomputed from its figures, and ours."""
    if "MT" not in spec.setups or "ST" not in spec.setups:
        return
    for method in METHODS:
        title, (single, multi) = METHOD_TITLES[method], (Variant(method, s) for s in ("ST", "MT"))
        given = lines.get(single), lines.get(multi)
        if given[0] is not None and given[1] is not None and given[0][0] and given[1][0]:
            recomputed = _difference(
                (title, "MT minus ST", "paper, recomputed"), given[1][0], given[0][0]
            )
            shown = printed.differences.get(method)
            if shown is not None:
                columns = (*spec.tasks, "avg")
                cells = [
                    paper(shown[n], mark="" if _agree(shown[n], cell.value) else "†")
                    for n, cell in zip(columns, recomputed.cells[1:], strict=True)
                ]
                yield Row((title, "MT minus ST", "paper, printed"), (dash, *cells))
            yield recomputed
        if single in members and multi in members:
            for name, field in (("ours", RIGHT), ("log-likelihood", LIKELIHOOD)):
                yield from _versus(
                    (title, "MT minus ST", name),
                    members[multi], members[single], spec, protocol, field,
                )  # fmt: skip


def _agree(printed: str, computed: float | None) -> bool:
    # Both figures are rounded to half a unit of the last digit.
    return computed is not None and abs(float(printed) - computed) <= TOLERANCE


def _baselines(
    spec: AccuracySpec, members: Mapping[Variant, Mapping[str, list[RecordedRun]]], protocol: str
) -> Iterator[Row]:
    """Lines for the base model, the majority class and chance, from any run on the same items."""
    if BASE in members:
        yield _line(("base model", "-", "ours"), members[BASE], spec, protocol, "accuracy")
        likelihood = ("base model", "-", "log-likelihood of the gold answer")
        yield _line(likelihood, members[BASE], spec, protocol, "gold_log_likelihood")
    one: dict[str, list[RecordedRun]] = {}
    for by_task in members.values():
        for task, runs in by_task.items():
            one.setdefault(task, runs[:1])
    for title, field in (("majority class", "majority_class"), ("chance", "chance")):
        cells = [_plain(one.get(task), task, protocol, field) for task in spec.tasks]
        values = [cell.value for cell in cells]
        average = dash if None in values else number(mean(v for v in values if v is not None))
        yield Row((title, "-", ""), (dash, *cells, average))


def _plain(runs: Sequence[RecordedRun] | None, task: str, protocol: str, field: str) -> Entry:
    if not runs:
        return dash
    return number(100 * runs[0].scores[task, protocol][field], records=_names(runs))


def accuracy_table(number: int, spec: AccuracySpec, sources: Sources) -> Made:
    """Build a table: first the paper's models with full runs, then every other block of runs with
    its conditions."""
    printed, standards = read_paper(PAPER, number), sources.standards
    known = list(contradictions(PAPER, number))
    found: dict[Key, Mapping[Variant, dict[str, list[RecordedRun]]]] = {}
    for key, runs in sources.blocks.runs.items():
        members = _members(spec, runs, standards)
        values = {variant.value for variant in members if variant != BASE}
        # A table that varies a setting excludes blocks with only one value of it.
        if members and (spec.values == ("",) or len(values) > 1):
            found[key] = members
    made: list[Block] = []
    for model in spec.models:
        full = [k for k in found if k[0] == model and block_title(k, standards)[1]]
        for key in full or [(model, "", "")]:
            heading = MODEL_TITLES[model]
            if key in found:
                heading += f": {block_title(key, standards)[0]}"
            members = found.pop(key, {})
            made.append(_block(spec, model, printed, heading, key[1], members, True, known))
    for key in sorted(found) if spec.others else ():
        heading = f"{MODEL_TITLES.get(key[0], key[0])}: {block_title(key, standards)[0]}"
        made.append(_block(spec, key[0], printed, heading, key[1], found[key], False, known))
    return made, [*NOTES, *dict.fromkeys(f"The paper (†): {entry.text}." for entry in known)]
