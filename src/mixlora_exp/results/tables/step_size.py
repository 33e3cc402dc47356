"""Table 12: LoRA and MixLoRA at step sizes of their own, by docs/comparison.md; not a table of the
paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from statistics import mean

from mixlora_exp.records.wilson import LEVEL
from mixlora_exp.results.data_facts import reference
from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES, TASK_TITLES
from mixlora_exp.results.runs import LIKELIHOOD
from mixlora_exp.results.statistics.estimates import compare, estimate
from mixlora_exp.results.statistics.families import holm
from mixlora_exp.results.statistics.parts import TaskMean
from mixlora_exp.results.step_sizes import (
    METHODS,
    METRIC,
    MODEL,
    PROTOCOL,
    SEEDS,
    STEPS,
    TASKS,
    Pair,
    Progress,
    StepCell,
    StepCells,
    choose,
    pairs,
    read_cells,
)
from mixlora_exp.results.tables.paired import ACCURACY, above, area, difference, names_of
from mixlora_exp.results.tables.parts import (
    AVERAGE,
    AVERAGE_ABOVE,
    REFERENCE,
    Block,
    Entry,
    Row,
    Table,
    dash,
    number,
    ours,
    versus,
)
from mixlora_exp.results.tables.registry import Made, Sources, table
from mixlora_exp.results.tables.summary import bare, seeds_in_heading

NUMBER = 12
HELD_OUT, CHOSEN = "held out", "chosen"
TITLES = tuple(TASK_TITLES[task] for task in TASKS)
COLUMNS = (*TITLES, AVERAGE, AVERAGE_ABOVE)
WORDS = {
    METRIC: "answers by log-likelihood per character",
    ACCURACY: "answers by log-likelihood, not divided by length",
    LIKELIHOOD: "log-likelihood of the right answer in nats",
}
NOTES = (
    "What is compared, and by which rule, was written down before the runs (docs/comparison.md). "
    "The average over all four tasks decides, whether or not one of them is at chance.",
    "Mean over seeds; in brackets the 95 % interval over items and seeds. ° not above chance and "
    "the most frequent answer of the training split, or a difference of two such cells. Above "
    "chance: the average over the tasks on which most lines are. Differences are paired over the "
    "same items and seeds. Single tasks, accuracy without normalisation and the log-likelihood "
    "decide nothing and are not marked.",
)
CHOICE = (
    "Held out: the average on training rows that no run is trained on, by which each method's step "
    "size is chosen: of those within 0.2 points of the highest the smallest. Test items play no "
    "part."
)
FAMILIES = (
    "The first line decides, by its own p; the other five are corrected together by Holm's method "
    "(q). Better or worse: q at most 0.05."
)


def _flags(one: StepCell, metric: str) -> list[bool]:
    """Return whether a cell lies above chance and the most frequent answer, task by task."""
    return [
        above(part, one.tested, task, PROTOCOL)
        for part, task in zip(one.parts(metric), TASKS, strict=True)
    ]


def _kept(cells: StepCells, metric: str) -> list[int]:
    """Return places of the tasks on which more than half of the cells lie above chance."""
    lines = [_flags(one, metric) for one in cells.values()]
    return [at for at in range(len(TASKS)) if 2 * sum(line[at] for line in lines) > len(lines)]


def _averaged(
    parts: Sequence[TaskMean], kept: Sequence[int], make: Callable[..., Entry]
) -> tuple[Entry, Entry]:
    some = [parts[at] for at in kept]
    return make(*parts), make(*some) if some else dash


def _scores(cells: StepCells, metric: str) -> Block:
    kept, chosen = _kept(cells, metric), [choose(cells, method) for method in METHODS]
    run = next(iter(cells.values())).tested[0]
    levels = [100 * reference(run, task, PROTOCOL) for task in TASKS]
    every = mean(levels)
    rows = []
    for one in cells.values():
        names, parts = names_of(one.tested), one.parts(metric)

        def make(*some: TaskMean, level: float, names: tuple[str, ...] = names) -> Entry:
            found = estimate(*some)
            return ours(found, names, at_chance=100 * found.low <= level)

        cells_ = [make(part, level=level) for part, level in zip(parts, levels, strict=True)]
        cells_.append(make(*parts, level=every))
        some = [parts[at] for at in kept]
        cells_.append(make(*some, level=mean(levels[at] for at in kept)) if some else dash)
        if metric == METRIC:
            cells_.append(ours(estimate(*one.parts(held_out=True)), names_of(one.held_out)))
        label = (METHOD_TITLES[one.method], str(one.step), CHOSEN if one in chosen else "")
        rows.append(Row(label, tuple(cells_)))
    level = [*levels, every, mean(levels[at] for at in kept) if kept else None]
    more = (dash,) if metric == METRIC else ()
    rows.append(Row((REFERENCE, "", ""), (*map(number, level), *more)))
    columns = (*COLUMNS, HELD_OUT) if metric == METRIC else COLUMNS
    heading = f"Accuracy in percent, {WORDS[metric]}"
    notes = (CHOICE,) if metric == METRIC else ()
    stub = ("method", "step size", "")
    return Block(heading, stub, columns, tuple(rows), run=True, notes=notes)


def _likelihoods(cells: StepCells) -> Block:
    rows = []
    for one in cells.values():
        values = [
            mean(run.scores[task, PROTOCOL][LIKELIHOOD] for run in one.tested) for task in TASKS
        ]
        shown = (number(v, 2, names_of(one.tested)) for v in (*values, mean(values)))
        rows.append(Row((METHOD_TITLES[one.method], str(one.step), ""), tuple(shown)))
    columns = (*TITLES, AVERAGE)
    heading = f"Mean {WORDS[LIKELIHOOD]}"
    return Block(heading, ("method", "step size", ""), columns, tuple(rows), run=True)


def _areas(cells: StepCells) -> Iterator[Block]:
    """Yield the area under the ROC curve of the tasks with two answers, in percent: 50 for any
    constant answer."""
    parts = {
        key: [area(one.tested, task, PROTOCOL) for task in TASKS] for key, one in cells.items()
    }
    two = [at for at in range(len(TASKS)) if all(own[at] is not None for own in parts.values())]
    if not two:
        return
    rows = []
    for key, one in cells.items():
        found = [estimate(part) for at in two if (part := parts[key][at]) is not None]
        names = names_of(one.tested)
        shown = tuple(ours(entry, names, at_chance=entry.low <= 0.5) for entry in found)
        rows.append(Row((METHOD_TITLES[one.method], str(one.step), ""), shown))
    columns = tuple(TITLES[at] for at in two)
    heading = "Area under the ROC curve in percent, 50 for any constant answer"
    yield Block(heading, ("method", "step size", ""), columns, tuple(rows), run=True)


def _versus(pair: Pair, metric: str, kept: Sequence[int]) -> list[Entry]:
    """Return one difference per task, and their averages over all and over those above chance."""
    sides: tuple[StepCell, StepCell] = (pair.first, pair.second)
    names = names_of([run for side in sides for run in side.tested])
    found = [difference(*(s.tested for s in sides), task, PROTOCOL, metric) for task in TASKS]
    parts = [part for part in found if part is not None]
    level = METRIC if metric == LIKELIHOOD else metric
    either = [any(flags) for flags in zip(*(_flags(side, level) for side in sides), strict=True)]

    def make(*some: TaskMean, at_chance: bool = False) -> Entry:
        nats = metric == LIKELIHOOD
        return versus(compare(*some), names, nats=nats, at_chance=at_chance and not nats)

    single = [make(part, at_chance=not known) for part, known in zip(parts, either, strict=True)]
    return [*single, *_averaged(parts, kept, make)]


def _differences(cells: StepCells, metric: str) -> Block:
    kept = _kept(cells, METRIC if metric == LIKELIHOOD else metric)
    compared = list(pairs(cells, METHOD_TITLES))
    lines = [_versus(pair, metric, kept) for pair in compared]
    if metric == METRIC:
        at = COLUMNS.index(AVERAGE)
        for line, q in zip(lines, _corrected(compared, lines), strict=True):
            line[at] = _marked(line[at], q)
    rows = tuple(Row(pair.label, tuple(line)) for pair, line in zip(compared, lines, strict=True))
    best = ", ".join(f"{METHOD_TITLES[m]} at {choose(cells, m).step}" for m in METHODS)
    heading = f"Differences, {WORDS[metric]} (own best: {best})"
    stub = ("", "step size", "")
    notes = (FAMILIES,) if metric == METRIC else ()
    return Block(heading, stub, COLUMNS, rows, run=True, metric=metric, notes=notes)


def _corrected(compared: Sequence[Pair], lines: Sequence[Sequence[Entry]]) -> list[float]:
    """Return q of each comparison's average: p for the primary one, Holm's over the others."""
    at = COLUMNS.index(AVERAGE)
    p = [line[at].p if line[at].p is not None else 1.0 for line in lines]
    others = [n for n, pair in enumerate(compared) if not pair.primary]
    adjusted = dict(zip(others, holm([p[n] for n in others]), strict=True))
    return [adjusted.get(n, own) for n, own in enumerate(p)]


def _marked(entry: Entry, q: float) -> Entry:
    better = entry.value is not None and entry.value > 0
    mark = ("better" if better else "worse") if q <= 1 - LEVEL else ""
    return dataclasses.replace(entry, q=q, mark=mark)


def _first_page(blocks: Sequence[Block]) -> list[Block]:
    """Return scores without the tasks' intervals, and the averages of the differences with p and
    q."""
    if not blocks[0].run:
        return list(blocks)
    scores, versus_ = blocks[:2]
    at = [scores.columns.index(title) for title in TITLES]
    rows = tuple(
        Row(row.label, tuple(bare(c) if n in at else c for n, c in enumerate(row.cells)))
        for row in scores.rows
    )
    average, over = (versus_.columns.index(title) for title in (AVERAGE, AVERAGE_ABOVE))
    lines = tuple(
        Row(row.label, (row.cells[average], row.cells[over], *map(_small, (
            row.cells[average].p, row.cells[average].q
        ))))
        for row in versus_.rows
    )  # fmt: skip
    columns = (AVERAGE, AVERAGE_ABOVE, "p", "q")
    first = dataclasses.replace(scores, heading=scores.words, rows=rows, words="")
    second = dataclasses.replace(
        versus_, rows=lines, columns=columns, heading=versus_.words, words=""
    )
    return [seeds_in_heading(first), seeds_in_heading(second)]


def _small(value: float | None) -> Entry:
    if value is None:
        return dash
    return Entry("text", text="<0.001" if value < 0.001 else f"{value:.3f}")


def _unfinished(progress: Progress) -> Block:
    """Return how many seeds of each cell are there, and no result."""
    rows = []
    for method in METHODS:
        for step in STEPS:
            cells = []
            for found in (progress.tested, progress.held_out):
                runs = [run for place, run in found.items() if place[:2] == (method, step)]
                text = f"{len(runs)} of {len(SEEDS)}"
                cells.append(Entry("text", text=text, records=names_of(runs)))
            rows.append(Row((METHOD_TITLES[method], str(step)), tuple(cells)))
    heading = (
        f"{len(progress.tested)} of {progress.total} runs are collected, "
        f"{len(progress.held_out)} of {progress.total} scored on held-out rows: nothing is "
        "compared before all are"
    )
    columns = ("seeds run", "scored on held-out rows")
    return Block(heading, ("method", "step size"), columns, tuple(rows))


def complete(found: Table) -> bool:
    """Return whether all runs are there."""
    return any(block.run for block in found.blocks)


def scores(found: Table) -> Block:
    """Return the scores by the metric that decides, of a table that is complete."""
    return found.blocks[0]


def differences(found: Table) -> dict[tuple[str, ...], Entry]:
    """Return the averages of all comparisons by label, of a table that is complete; the primary one
    first."""
    versus_ = found.blocks[1]
    at = versus_.columns.index(AVERAGE)
    return {row.label: row.cells[at] for row in versus_.rows}


@table(NUMBER, "LoRA and MixLoRA at step sizes of their own")
def step_size_table(sources: Sources) -> Made:
    """Build the table: scores and differences by the metric that decides, then by the others."""
    progress = read_cells([*sources.runs, *sources.study], sources.standards)
    if not progress.complete:
        return [_unfinished(progress)], NOTES, _first_page, NOTES[0]
    cells = progress.cells
    blocks = [
        block
        for metric in (METRIC, ACCURACY)
        for block in (_scores(cells, metric), _differences(cells, metric))
    ]
    blocks += [_likelihoods(cells), _differences(cells, LIKELIHOOD), *_areas(cells)]
    where = f"{MODEL_TITLES[MODEL]}, 9,500 training rows of four tasks, 1 epoch, full test sets"
    made = [dataclasses.replace(block, words=f"{where}: {block.heading}") for block in blocks]
    return made, NOTES, _first_page, " ".join(NOTES)
