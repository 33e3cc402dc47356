"""Marks of a table's comparisons, corrected for their number."""

from __future__ import annotations

import dataclasses

from mixlora_exp.records.wilson import LEVEL
from mixlora_exp.results.statistics.families import holm
from mixlora_exp.results.tables.parts import Entry, Row, Table


def _counts(entry: Entry) -> bool:
    """Return whether a comparison can be marked: of several seeds, and above chance."""
    return entry.kind == "versus" and entry.seeds > 1 and not entry.at_chance


def corrected(table: Table) -> Table:
    """Return the table with q (Holm's adjusted p) and mark of each comparison that can have one.
    The family is all of them in the table, unless its maker has already corrected some: then the
    table is returned as it is."""
    if any(cell.q is not None for cell in table.cells()):
        return table
    family = [cell for cell in table.cells() if _counts(cell)]
    adjusted = holm([cell.p if cell.p is not None else 1.0 for cell in family])
    marked = {id(cell): _marked(cell, q) for cell, q in zip(family, adjusted, strict=True)}
    blocks = [
        dataclasses.replace(
            block,
            rows=tuple(
                Row(row.label, tuple(marked.get(id(cell), cell) for cell in row.cells))
                for row in block.rows
            ),
        )
        for block in table.blocks
    ]
    return dataclasses.replace(table, blocks=blocks)


def _marked(entry: Entry, q: float) -> Entry:
    better = entry.value is not None and entry.value > 0
    mark = ("better" if better else "worse") if q <= 1 - LEVEL else ""
    return dataclasses.replace(entry, q=q, mark=mark)
