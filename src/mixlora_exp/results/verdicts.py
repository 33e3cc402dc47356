"""Verdicts on each printed accuracy: is it possible, does it mean anything, do runs
of this project reproduce it? The rule stands in docs/results.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.results.data_facts import majority_of_train
from mixlora_exp.results.paper import (
    METHOD_TITLES,
    MODEL_TITLES,
    TASK_TITLES,
    contradictions,
    line_id,
    read_paper,
)
from mixlora_exp.results.self_checks import Checked
from mixlora_exp.results.tables.parts import Entry, Table
from mixlora_exp.tasks import TASKS

TABLES = (1, 2, 5, 8, 9)
MARGIN, SEEDS = 2.0, 3
"""Points within which a result is the same; seeds that a verdict needs."""
HALF = 0.05 + 1e-9
"""Rounding of a printed accuracy, in points."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One printed cell. `faults`: why the paper's own figure is in doubt; `verdict`: reproduced,
    not reproduced, undecidable, or not run; `ours`: the cell of this project, if it was run."""

    table: int
    line: str
    column: str
    printed: float
    faults: tuple[str, ...]
    verdict: str
    ours: Entry | None = None


def possible(printed: float, items: int) -> bool:
    """Return whether an accuracy of `items` answers, in percent, can round to `printed`."""
    right = round(printed * items / 100)
    near = (right + step for step in (-1, 0, 1))
    return any(abs(100 * count / items - printed) <= HALF for count in near)


def _faults(line: Mapping[str, str], column: str, contradicted: Mapping) -> tuple[str, ...]:
    found = list(contradicted.get((line_id(line), column), ()))
    if column not in TASKS:
        return tuple(found)
    printed, items = float(line[column]), TASKS[column].sizes["test"]
    if not possible(printed, items):
        found.append(f"no number of {items:,} answers gives {printed}")
    chance = 100 * max(majority_of_train(column) or 0.0, 1 / OPTIONS[column])
    if printed <= chance + HALF:
        found.append(f"not above chance or the most frequent answer of training ({chance:.1f})")
    return tuple(found)


OPTIONS = {
    "arc_e": 4, "arc_c": 4, "boolq": 2, "obqa": 4, "piqa": 2, "siqa": 3, "hellaswag": 4,
    "winogrande": 2,
}  # fmt: skip
"""Answers of a question (of ARC, of nearly all)."""


def judged(difference: Entry | None) -> str:
    """Return the verdict on a line `ours minus paper`, by the rule."""
    if difference is None or difference.value is None:
        return "not run"
    low, high = difference.low, difference.high
    if low is None or high is None or difference.seeds < SEEDS:
        return "undecidable"
    if low >= -MARGIN and high <= MARGIN:
        return "reproduced"
    return "not reproduced" if low > MARGIN or high < -MARGIN else "undecidable"


def _ours(table: Table, label: Sequence[str], model: str, column: str) -> tuple[Entry | None, ...]:
    """Return our cell and its difference to the printed one, of the block that stands beside the
    paper: others of the model have other conditions, and no such difference."""
    wanted = (MODEL_TITLES[model], tuple(label))
    title = TASK_TITLES.get(column, "average")
    for block in table.blocks:
        if not block.heading.startswith(wanted[0]) or not block.run:
            continue
        found: dict[str, Entry] = {}
        for row in block.rows:
            if row.label[:2] == wanted[1]:
                found[row.label[2]] = row.cells[block.columns.index(title)]
        if "ours minus paper" in found:
            return found["ours"], found["ours minus paper"]
    return None, None


def _label(line: Mapping[str, str]) -> tuple[str, str]:
    """Return the label of the line in its table."""
    value = f" r={line['rank']}" if "rank" in line else ""
    value += f" coef={line['router_loss_coef']}" if "router_loss_coef" in line else ""
    return METHOD_TITLES[line["method"]] + value, line.get("setup", "ST")


def verdicts(folder: Path, tables: Mapping[int, Table]) -> Iterator[Verdict]:
    """Yield verdicts on every printed accuracy and average of Tables 1, 2, 5, 8 and 9."""
    for number in TABLES:
        printed = read_paper(folder, number)
        known: dict[tuple[tuple[str, ...], str], list[str]] = {}
        for entry in contradictions(folder, number):
            if entry.line is not None:
                known.setdefault((entry.line, entry.column), []).append(entry.text)
        for line in printed.lines:
            label = _label(line)
            for column in (*printed.tasks, "avg"):
                ours, difference = _ours(tables[number], label, line["model"], column)
                yield Verdict(
                    number,
                    f"{MODEL_TITLES[line['model']]}, {label[0]}, {label[1]}",
                    TASK_TITLES.get(column, "average"),
                    float(line[column]),
                    _faults(line, column, known),
                    judged(difference),
                    ours,
                )


HEAD = """# Verdicts on the paper's figures

Made by `make tables`; the rule was written before any run of the paper's models and stands in
[docs/results.md](../../docs/results.md#when-a-figure-of-the-paper-is-reproduced).
"""


def _rows_run(found: Sequence[Verdict]) -> Iterator[str]:
    """Yield each model with the number of its printed lines of which a cell was run."""
    rows: dict[str, dict[tuple[int, str], bool]] = {}
    for entry in found:
        own, line = rows.setdefault(entry.line.split(", ")[0], {}), (entry.table, entry.line)
        own[line] = own.get(line, False) or entry.verdict != "not run"
    for model, own in rows.items():
        yield f"{model} {sum(own.values())} of {len(own)}"


def verdicts_markdown(found: Sequence[Verdict], checked: Sequence[Checked]) -> str:
    """Counts, the cells that were run, and the figures of the paper that are in doubt. `checked`:
    figures that are no accuracies, which the paper alone is held against."""
    counts = Counter(entry.verdict for entry in found)
    summary = ", ".join(f"{counts[name]} {name}" for name in
                     ("reproduced", "not reproduced", "undecidable", "not run"))  # fmt: skip
    lines = [HEAD, f"\n{len(found)} printed accuracies and averages: {summary}.\n"]
    lines.append(f"Rows run: {', '.join(_rows_run(found))}.\n")
    run = [entry for entry in found if entry.verdict != "not run" and entry.ours is not None]
    if run:
        lines.append("\n| table | line | column | paper | ours | verdict |\n")
        lines.append("| --- | --- | --- | ---: | ---: | --- |\n")
        lines += [
            f"| {v.table} | {v.line} | {v.column} | {v.printed} | {v.ours.show()} | {v.verdict} |\n"
            for v in run
            if v.ours is not None
        ]
    doubted = [entry for entry in found if entry.faults]
    lines.append(f"\n## In doubt by themselves: {len(doubted)}\n\n")
    lines.append("| table | line | column | paper | why |\n| --- | --- | --- | ---: | --- |\n")
    lines += [
        f"| {v.table} | {v.line} | {v.column} | {v.printed} | {'; '.join(v.faults)} |\n"
        for v in doubted
    ]
    wrong = [entry for entry in checked if entry.fault]
    lines.append(
        f"\n## Figures that are no accuracies: {len(wrong)} of {len(checked)} contradicted\n\n"
        "Differences of Table 2 by its two rows, percentages of Tables 6 and 7 by the figures "
        "beside them, #Params by the models' shapes, each within its rounding.\n\n"
    )
    lines.append("| table | line | column | paper | why |\n| --- | --- | --- | ---: | --- |\n")
    lines += [f"| {c.table} | {c.line} | {c.column} | {c.printed} | {c.fault} |\n" for c in wrong]
    return "".join(lines)
