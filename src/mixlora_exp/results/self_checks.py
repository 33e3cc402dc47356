"""Figures of the paper that are no accuracies, checked against the paper alone: differences of
Table 2, percentages of Tables 6 and 7, and #Params by the models' shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.results.paper import (
    METHOD_TITLES,
    MODEL_TITLES,
    TASK_TITLES,
    TOLERANCE,
    printed_differences,
    read_paper,
)
from mixlora_exp.results.tables.parts import NO_TASKS, Table

HALF = 0.05 + 1e-9
"""Rounding of a figure that is printed with one digit."""
PARAMETERS = NO_TASKS[0]
WITH_PARAMETERS = (1, 2, 5, 8)


@dataclass(frozen=True, slots=True)
class Checked:
    """One printed figure; `fault`: why the paper's other figures contradict it, or empty."""

    table: int
    line: str
    column: str
    printed: str
    fault: str


def _differences(folder: Path) -> Iterator[Checked]:
    table = read_paper(folder, 2)
    model = MODEL_TITLES[table.lines[0]["model"]]
    for method, column, printed, found in printed_differences(table):
        wrong = abs(found - float(printed)) > TOLERANCE
        fault = f"the two rows give {found:.1f}" if wrong else ""
        title = f"{model}, {METHOD_TITLES[method]}, MT minus ST"
        yield Checked(2, title, TASK_TITLES.get(column, "average"), printed, fault)


def _percentages(folder: Path, number: int) -> Iterator[Checked]:
    """Yield the percentages of the line of LoRA: a quotient of two rounded figures, rounded."""
    lines = read_paper(folder, number).lines
    base = lines[0]
    for line in lines:
        optimized = {"yes": " optimized", "no": " not optimized"}.get(line["optimized"], "")
        title = f"{METHOD_TITLES[line['method']]}{optimized}, adapters: {line['models']}"
        for name in (name for name in line if name.endswith("_pct")):
            figure = next(n for n in line if n.startswith(name.removesuffix("pct")) and n != name)
            own, plain = float(line[figure]), float(base[figure])
            lowest, highest = (
                100 * (own + sign * HALF) / (plain - sign * HALF) + sign * HALF for sign in (-1, 1)
            )
            wrong = not lowest <= float(line[name]) <= highest
            fault = f"{own:g} of {plain:g} is {100 * own / plain:.1f}" if wrong else ""
            yield Checked(number, title, name.removesuffix("_pct").replace("_", " "), line[name],
                          fault)  # fmt: skip


def _parameters(table: Table) -> Iterator[Checked]:
    """Yield #Params beside what the shapes give in the paper's denominator."""
    for block in table.blocks:
        if PARAMETERS not in block.columns:
            continue
        at = block.columns.index(PARAMETERS)
        by_label = {row.label: row.cells[at] for row in block.rows}
        for (*line, source), printed in by_label.items():
            counted = by_label.get((*line, "ours"))
            if source != "paper" or printed.value is None or counted is None:
                continue
            known = re.match(r"([\d.]+);", counted.text)
            if known is None:
                # Nothing to hold it against.
                continue
            text = f"{printed.value:.{printed.digits}f}"
            half = 0.5 * 10**-printed.digits + 1e-9
            wrong = abs(float(known[1]) - printed.value) > half
            fault = f"the shapes give {known[1]}" if wrong else ""
            title = ", ".join([block.heading.partition(":")[0], *line])
            yield Checked(table.number, title, PARAMETERS, text, fault)


def self_checks(folder: Path, tables: Mapping[int, Table]) -> Iterator[Checked]:
    """Yield every printed figure of the paper's tables that is no accuracy."""
    yield from _differences(folder)
    for number in (6, 7):
        yield from _percentages(folder, number)
    for number in WITH_PARAMETERS:
        yield from _parameters(tables[number])
