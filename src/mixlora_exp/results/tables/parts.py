"""Data structures of a table, which renderers convert to Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mixlora_exp.results.statistics.estimates import Comparison, Estimate

NATS_DIGITS = 3
"""Digits of a difference in nats, by which it differs from one in points."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a table.

    `kind`: paper (printed), ours (from records), difference (of two entries), versus (paired
    comparison), text, or dash (not run). Accuracies are in percent; `low` and `high` bound the 95 %
    interval over items and seeds; `p`: of a versus, and `q`, corrected for the table's other
    comparisons; `at_chance`: not above chance or the most frequent answer of training, never
    marked; `records`: names of the runs behind a number.
    """

    kind: str
    value: float | None = None
    text: str = ""
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    items: int = 0
    digits: int = 1
    signed: bool = False
    mark: str = ""
    p: float | None = None
    q: float | None = None
    at_chance: bool = False
    records: tuple[str, ...] = ()

    @property
    def nats(self) -> bool:
        """Whether a comparison is one of log-likelihoods, which have no chance level."""
        return self.kind == "versus" and self.digits == NATS_DIGITS

    def show(self, interval: bool = True) -> str:
        """Return the entry as plain text."""
        if self.value is None or (self.kind == "versus" and self.text):
            return self.text or "-"
        sign = "+" if self.signed else ""
        shown = f"{self.value:{sign},.{self.digits}f}"
        if interval and self.low is not None and self.high is not None:
            shown += f" [{self.low:{sign}.{self.digits}f}, {self.high:{sign}.{self.digits}f}]"
        return shown + "°" * self.at_chance + (f" {self.mark}" if self.mark else "")


AVERAGE, AVERAGE_ABOVE = "average", "above chance"
"""Columns of an average over all tasks, and those on which the block's runs are above chance."""
REFERENCE = "chance or majority"
"""Label of the line that a cell must lie above: by chance, or by always giving the answer that is
most frequent in the training split."""
NO_TASKS = ("#Params (%)", AVERAGE, AVERAGE_ABOVE)


@dataclass(frozen=True, slots=True)
class Row:
    """A line: its label, and one entry per column of its block."""

    label: tuple[str, ...]
    cells: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Lines under one heading; `stub`: column titles of the label's parts. `run`: whether it has
    results of this project."""

    heading: str
    stub: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    run: bool = False
    notes: tuple[str, ...] = ()
    words: str = ""
    """The heading in words, for readers who do not know the names of settings."""
    metric: str = "accuracy"
    """What the accuracies and their differences are of."""

    @property
    def filled(self) -> dict[str, tuple[int, int]]:
        """Number of our entries with a value, and of all (without averages and parameter counts),
        by setup."""
        found: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            if row.label[-1] != "ours" or "minus" in row.label[1] or row.label[1] == "-":
                continue
            named = zip(self.columns, row.cells, strict=True)
            cells = [cell for column, cell in named if column not in NO_TASKS]
            run, total = found.get(row.label[1], (0, 0))
            run += sum(cell.value is not None for cell in cells)
            found[row.label[1]] = (run, total + len(cells))
        return found


@dataclass(frozen=True, slots=True)
class Table:
    """A table with the paper's figures and this project's results."""

    number: int
    title: str
    blocks: Sequence[Block]
    notes: Sequence[str] = field(default_factory=list)
    summary: Sequence[Block] = ()
    """Content of the table's first page, where that is not all of it."""
    legend: str = ""
    """What stands under the first page in place of the usual legend."""

    @property
    def name(self) -> str:
        """Stem of the table's files: `table1`."""
        return f"table{self.number}"

    def cells(self) -> Iterator[Entry]:
        """Yield all entries."""
        for block in self.blocks:
            for row in block.rows:
                yield from row.cells

    def records(self) -> set[str]:
        """Return names of all records used by the table."""
        return {name for cell in self.cells() for name in cell.records}


dash = Entry("dash")


def paper(printed: str | None, mark: str = "") -> Entry:
    """Return a figure as printed in the paper; `mark`: set if another statement contradicts it."""
    if printed is None or printed == "":
        return dash
    return Entry("paper", float(printed), digits=len(printed.partition(".")[2]), mark=mark)


def number(value: float | None, digits: int = 1, records: tuple[str, ...] = ()) -> Entry:
    """Return a computed figure without an interval."""
    return dash if value is None else Entry("ours", value, digits=digits, records=records)


def ours(found: Estimate, records: tuple[str, ...], *, at_chance: bool = False) -> Entry:
    """Return an accuracy from records, in percent."""
    return Entry(
        "ours",
        100 * found.value,
        low=100 * found.low,
        high=100 * found.high,
        seeds=found.seeds,
        items=found.items,
        at_chance=at_chance,
        records=records,
    )


def versus(
    found: Comparison, records: tuple[str, ...], *, nats: bool = False, at_chance: bool = False
) -> Entry:
    """Return a paired difference in percentage points, or in nats. Its mark depends on the table's
    other comparisons (`marks.corrected`). A difference in nats that is zero in every item and seed
    has no interval: it is said in words."""
    if nats and found.low == found.high == 0:
        return Entry(
            "versus", 0.0, text="equal", seeds=found.seeds, items=found.items, digits=NATS_DIGITS,
            signed=True, p=1.0, records=records,
        )  # fmt: skip
    scale, digits = (1, NATS_DIGITS) if nats else (100, 1)
    return Entry(
        "versus",
        scale * found.value,
        low=scale * found.low,
        high=scale * found.high,
        seeds=found.seeds,
        items=found.items,
        digits=digits,
        signed=True,
        p=found.p,
        at_chance=at_chance,
        records=records,
    )
