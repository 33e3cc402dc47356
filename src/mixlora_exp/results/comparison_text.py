"""A comparison of runs for the terminal, as tidy data, and as the lines of a forest plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from mixlora_exp.errors import shown
from mixlora_exp.records.layout import Column, Sheet
from mixlora_exp.records.wilson import percent
from mixlora_exp.results.comparison import Compared, Measured, Side, Versus
from mixlora_exp.results.forest import Contrast
from mixlora_exp.results.headings import word
from mixlora_exp.results.paper import METHOD_TITLES
from mixlora_exp.results.tables.parts import Entry

METRICS = {"accuracy": "", "accuracy_normalized": " per char."}
COLUMNS = (
    "side", "runs", "task", "protocol", "metric", "value", "low", "high", "chance", "majority",
    "minus", "delta", "delta_low", "delta_high", "p", "q", "items", "seeds", "verdict",
)  # fmt: skip


def title(side: Side) -> str:
    """Return a side in words: method, task of training and seeds."""
    run = side.runs[0]
    method = METHOD_TITLES.get(run.method, run.method)
    mix = f" trained on {'+'.join(run.mix)}" if run.mix else ""
    seeds = ", ".join(map(str, side.seeds))
    several = f"{len(side.runs)} runs, seeds {seeds}" if side.runs[1:] else f"seed {seeds}"
    return shown(f"{side.letter}  {run.model} {method}{mix}, {several}", 200)


def label(one: Measured) -> str:
    """Return the heading of a line."""
    return shown(f"{one.task}, {one.protocol}{METRICS[one.metric]}", 80)


def _bounded(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{percent(value, sign=sign)} [{percent(low, sign=sign)}, {percent(high, sign=sign)}]"


def _chance_of(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def settings_sheet(compared: Compared) -> Sheet:
    """Return what differs in the configurations, one line a setting."""
    columns = [
        Column(side.letter, [shown(word(values[at]), 28) for values in compared.differing.values()])
        for at, side in enumerate(compared.sides)
    ]
    names = [shown(name, 60) for name in compared.differing]
    return Sheet("What differs", Column("setting", names), columns)


def scores_sheet(compared: Compared) -> Sheet:
    """Return accuracies in percent with chance, the most frequent answer, and intervals."""
    columns = [
        Column("chance", [percent(one.scores[0].chance) for one in compared.measured]),
        Column("major.\nclass", [percent(one.scores[0].majority) for one in compared.measured]),
    ]
    for side in compared.sides:
        cells = []
        for one in compared.measured:
            own = next((score for score in one.scores if score.side is side), None)
            e = None if own is None else own.estimate
            grey = "" if own is None or own.above else "°"
            cells.append("-" if e is None else _bounded(e.value, e.low, e.high) + grey)
        columns.append(Column(side.letter, cells))
    labels = [label(one) for one in compared.measured]
    heading = "Accuracy in %, with 95 % intervals; °: not above chance and majority class"
    return Sheet(heading, Column("task", labels), columns)


def _each(compared: Compared) -> Iterator[tuple[Measured, Side, Versus]]:
    for one in compared.measured:
        for versus in one.differences:
            yield one, one.scores[0].side, versus


def differences_sheet(compared: Compared) -> Sheet:
    """Paired differences in points, one line a task and pair of sides."""
    lines = [(f"{v.side.letter} - {base.letter} {label(one)}", v)
             for one, base, v in _each(compared)]  # fmt: skip

    def column(head: str, cell: Any) -> Column:
        return Column(head, ["-" if v.comparison is None else cell(v) for _, v in lines])

    columns = [
        column(
            "difference",
            lambda v: _bounded(v.comparison.value, v.comparison.low, v.comparison.high, "+"),
        ),
        column("p", lambda v: _chance_of(v.comparison.p)),
    ]
    if any(v.q is not None for _, v in lines):
        columns.append(column("q", lambda v: "-" if v.q is None else _chance_of(v.q)))
    columns.append(Column("verdict", [v.verdict for _, v in lines]))
    columns.append(column("items", lambda v: str(v.comparison.items)))
    heading = "Paired differences in points, with 95 % intervals (one seed says nothing of others)"
    return Sheet(heading, Column("task", [name for name, _ in lines]), columns)


def notes(compared: Compared) -> list[str]:
    """Return, one line a pair of sides, which seeds a difference is over if not over all of them,
    and why there is none with the first side."""
    every = list(_each(compared))
    pairs = {(v.side.letter, base.letter) for _, base, v in every}
    found = []
    subtracted = {
        (v.side.letter, base.letter): (v.side, base)
        for _, base, v in every
        if v.comparison is not None
    }
    for side, base in subtracted.values():
        one_base = base.runs[0].method == "none" or len(side.runs) == len(base.runs) == 1
        common = [str(seed) for seed in side.seeds if seed in base.seeds]
        if common and not one_base and side.seeds != base.seeds:
            seeds = f"seed{'s' * (len(common) > 1)} {', '.join(common)}"
            found.append(f"{side.letter} - {base.letter}: over {seeds} alone, which both have")
    first = compared.sides[0].letter
    found += [
        f"{side.letter} - {first}: no difference, as all runs of both scored no task under one "
        "protocol"
        for side in compared.sides[1:]
        if (side.letter, first) not in pairs
    ]
    return found


def contrasts(compared: Compared) -> list[Contrast]:
    """Return the differences as lines of a forest plot."""
    return [
        Contrast(
            f"{v.side.letter} - {base.letter}, {label(one)}",
            Entry(
                "versus", 100 * v.comparison.value, low=100 * v.comparison.low,
                high=100 * v.comparison.high, seeds=v.comparison.seeds,
            ),
        )
        for one, base, v in _each(compared)
        if v.comparison is not None
    ]  # fmt: skip


def as_csv(compared: Compared) -> str:
    """Return one line a task, metric and side; fractions, not percent."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in compared.measured:
        versus = {v.side.letter: v for v in one.differences}
        for score in one.scores:
            own, e = versus.get(score.side.letter), score.estimate
            row = [
                score.side.letter, " ".join(run.name for run in score.side.runs), one.task,
                one.protocol, one.metric, e.value, e.low, e.high, score.chance, score.majority,
            ]  # fmt: skip
            c = None if own is None else own.comparison
            if own is None:
                row += [""] * 7
            else:
                base = one.scores[0].side.letter
                found = [""] * 4 if c is None else [c.value, c.low, c.high, c.p]
                row += [base, *found, "" if own.q is None else own.q, "" if c is None else c.items]
            row += [e.seeds, "" if own is None else own.verdict]
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in row])
    return stream.getvalue()
