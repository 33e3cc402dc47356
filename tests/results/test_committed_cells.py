"""The committed tables' accuracies: one set of conditions a row, and averages of what it shows."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from itertools import combinations
from statistics import mean

import pytest

from mixlora_exp.results.build import RESULTS, Results
from mixlora_exp.results.paper import TASK_TITLES
from mixlora_exp.results.tables.parts import AVERAGE, AVERAGE_ABOVE, NO_TASKS, Block, Row

TABLES = (1, 2, 5, 8, 9)
IDS = {title: task for task, title in TASK_TITLES.items()}


def blocks(results: Results) -> Iterator[Block]:
    for number in TABLES:
        yield from (block for block in results.tables[number].blocks if block.run)


def accuracies(block: Block) -> Iterator[Row]:
    """Lines of ours with a figure, no differences of lines."""
    for row in block.rows:
        ours = row.label[-1] == "ours" and "minus" not in row.label[1]
        if ours and any(cell.records for cell in row.cells):
            yield row


def protocol_of(block: Block) -> str:
    (name,) = re.findall(r"protocol (\w+)", block.heading)
    return name


def test_the_cells_of_a_row_share_their_conditions(committed: Results) -> None:
    runs = {run.name: run for run in committed.runs}
    seen = 0
    for block in blocks(committed):
        protocol, in_block = protocol_of(block), set()
        for row in accuracies(block):
            own = [runs[name] for cell in row.cells for name in cell.records]
            found = {json.dumps(run.conditions(protocol), sort_keys=True) for run in own}
            methods = {json.dumps(run.trained["method"], sort_keys=True) for run in own}
            assert len(found) == len(methods) == 1, (block.heading, row.label)
            if row.label[0] != "base model":
                in_block |= found
            if row.label[1] == "MT":
                assert len({run.mix for run in own}) == 1, row.label
            seen += 1
        assert len(in_block) == 1, f"{block.heading}: rows of other conditions"
    assert seen > 20


def test_a_cell_is_the_mean_of_its_records_scores(committed: Results) -> None:
    with (RESULTS / "scores.csv").open(newline="", encoding="utf-8") as stream:
        scores = {
            (line["record"], line["task"], line["protocol"]): float(line["value"])
            for line in csv.DictReader(stream)
            if line["metric"] == "accuracy"
        }
    for block in blocks(committed):
        for row in accuracies(block):
            for column, cell in zip(block.columns, row.cells, strict=True):
                if column in NO_TASKS or cell.value is None:
                    continue
                values = [scores[name, IDS[column], protocol_of(block)] for name in cell.records]
                assert cell.value == pytest.approx(100 * mean(values), abs=1e-3)
                assert cell.seeds == len(values)


def test_averages_are_over_the_cells_that_their_row_shows(committed: Results) -> None:
    """The last average over the same tasks in every line of a block."""
    seen = 0
    for block in blocks(committed):
        tasks = [column for column in block.columns if column not in NO_TASKS]
        possible = {set_ for n in range(1, len(tasks) + 1) for set_ in combinations(tasks, n)}
        for row in block.rows:
            kinds = {cell.kind for cell in row.cells[1:]}
            if kinds - {"dash"} not in ({"ours"}, {"versus"}):
                continue
            cells = dict(zip(block.columns, row.cells, strict=True))
            # Counts are printed without decimals, and are not accuracies.
            shown = [cells[task].value for task in tasks]
            if cells[AVERAGE].value is None:
                assert None in shown, (block.heading, row.label)
            else:
                assert cells[AVERAGE].value == pytest.approx(mean(shown)), row.label
                seen += 1
            above = cells[AVERAGE_ABOVE].value
            if above is not None:
                possible = {
                    set_
                    for set_ in possible
                    if None not in (values := [cells[task].value for task in set_])
                    and above == pytest.approx(mean(values))
                }
        assert possible, f"{block.heading}: no one set of tasks gives the last column"
    assert seen > 20


def test_the_same_runs_have_the_same_averages_in_all_tables(committed: Results) -> None:
    """The tasks that are above chance do not depend on which lines a table shows."""
    found: dict[tuple[object, ...], set[tuple[float | None, float | None]]] = {}
    shared = 0
    for number in (1, 2, 8, 9):
        for block in (one for one in committed.tables[number].blocks if one.run):
            tasks = tuple(c for c in block.columns if c not in NO_TASKS)
            for row in block.rows:
                if row.label[-1] == "ours":
                    cells = dict(zip(block.columns, row.cells, strict=True))
                    key = (tasks, protocol_of(block), cells[AVERAGE].records)
                    averages = (cells[AVERAGE].value, cells[AVERAGE_ABOVE].value)
                    shared += key in found and bool(cells[AVERAGE].records)
                    found.setdefault(key, set()).add(averages)
    several = [averages for (*_, records), averages in found.items() if records]
    assert shared >= 2, "lines that stand in Table 8 and in Table 9"
    assert all(len(averages) == 1 for averages in several)
