"""Tables for a terminal, split to fit its width without truncating cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

FRAME, EDGE = 3, 1
"""Characters of frame and padding: per column, and once per table."""
SHORTEST_LABEL = 8
"""Minimum width of folded row labels, in characters."""


@dataclass(frozen=True, slots=True)
class Column:
    """A header, possibly of several lines, and one text per row."""

    head: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        """Characters needed without truncation or wrapping."""
        return max(map(cell_len, [*self.head.splitlines(), *self.cells]), default=0)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: row labels and columns of figures. `summed`: the last row summarises the others, and
    a line separates it."""

    title: str
    labels: Column
    figures: Sequence[Column]
    summed: bool = False


def fitted(sheet: Sheet, width: int) -> Iterator[Table]:
    """Yield the sheet as tables of at most `width` characters, each with the labels and as many
    columns of figures as fit.

    Figures are never wrapped. Labels that leave no room for the widest figure are folded, to at
    least `SHORTEST_LABEL` characters; if even that is too wide, a table exceeds `width`.
    """
    widest = max((column.width for column in sheet.figures), default=0)
    room = width - EDGE - 2 * FRAME - widest
    label = min(sheet.labels.width, max(room, SHORTEST_LABEL))
    taken = start = EDGE + FRAME + label
    part: list[Column] = []
    for column in sheet.figures:
        if part and taken + FRAME + column.width > width:
            yield _framed(sheet, part, label, taken)
            part, taken = [], start
        part.append(column)
        taken += FRAME + column.width
    yield _framed(sheet, part, label, taken)


def _framed(sheet: Sheet, figures: Sequence[Column], label: int, width: int) -> Table:
    table = Table(width=width)
    # As `Text`, so that brackets in a task's name are not markup.
    table.add_column(Text(sheet.labels.head), overflow="fold", width=label, vertical="bottom")
    for column in figures:
        table.add_column(Text(column.head), justify="right", no_wrap=True, width=column.width)
    last = len(sheet.labels.cells) - 1
    for row, name in enumerate(sheet.labels.cells):
        if sheet.summed and row == last:
            table.add_section()
        table.add_row(Text(name), *(Text(column.cells[row]) for column in figures))
    return table
