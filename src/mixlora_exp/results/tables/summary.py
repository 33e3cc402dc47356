"""The first page of a table: of each block with results, the lines to read first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from mixlora_exp.results.tables.parts import (
    AVERAGE,
    AVERAGE_ABOVE,
    NO_TASKS,
    REFERENCE,
    Block,
    Entry,
    Row,
    dash,
)


def bare(entry: Entry) -> Entry:
    """Return a figure without its interval, which the details have."""
    return dataclasses.replace(entry, low=None, high=None)


def seeds_in_heading(block: Block) -> Block:
    """Return the block with its number of seeds in the heading; in the cells only where it
    varies."""
    cells = [cell for row in block.rows for cell in row.cells if cell.seeds]
    if not cells:
        return block
    few, many = (pick(cell.seeds for cell in cells) for pick in (min, max))
    seeds = str(few) if few == many else f"{few} to {many}"
    rows = block.rows
    if few == many:
        rows = tuple(
            Row(row.label, tuple(dataclasses.replace(cell, seeds=0) for cell in row.cells))
            for row in rows
        )
    heading = f"{block.heading}; {seeds} seed" + "s" * (many > 1)
    return dataclasses.replace(block, heading=heading, rows=rows)


def _accuracy_rows(block: Block) -> Iterator[Row]:
    """Yield means of the tasks, the averages with their intervals, and the difference to LoRA (or
    to the default value of the varied setting) of the average over tasks above chance."""
    at = {column: block.columns.index(column) for column in block.columns}
    lines = {row.label: row for row in block.rows}
    for row in block.rows:
        trained = row.label[2] == "ours" and any(cell.value is not None for cell in row.cells[1:])
        plain = row.label[0] == REFERENCE or row.label == ("base model", "-", "ours")
        if not (trained or plain):
            continue
        others = [
            line
            for label, line in lines.items()
            if label[:2] == row.label[:2]
            and label[2].startswith("minus ")
            and label[2] != "minus the base model"
        ]
        cells = [bare(row.cells[at[c]]) for c in block.columns if c not in NO_TASKS]
        average, above = (row.cells[at[c]] for c in (AVERAGE, AVERAGE_ABOVE))
        minus = others[0].cells[at[AVERAGE_ABOVE]] if others else dash
        if "minus" in row.label[1]:
            # The line is a difference itself.
            above, minus = dash, above
        yield Row(row.label[:2], (*cells, average, above, minus))


def summarize_accuracy(blocks: Sequence[Block]) -> list[Block]:
    """First pages of Tables 1, 2, 5, 8 and 9; only the paper's lines where nothing was run."""
    if not any(block.run for block in blocks):
        return [
            dataclasses.replace(
                block, rows=tuple(row for row in block.rows if "paper" in row.label[-1])
            )
            for block in blocks
        ]
    made = []
    for block in blocks:
        if not block.run:
            continue
        rows = tuple(_accuracy_rows(block))
        others = (row.label[2] for row in block.rows if row.label[2].startswith("minus "))
        title = next((other for other in others if other != "minus the base model"), "difference")
        columns = [column for column in block.columns if column not in NO_TASKS]
        titles = (*columns, AVERAGE, AVERAGE_ABOVE, title)
        found = Block(block.words, block.stub[:2], titles, rows, run=True, notes=block.notes)
        made.append(seeds_in_heading(found))
    return made
