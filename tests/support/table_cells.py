"""Finding cells in tables, and runs to fill them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mixlora_exp.records.record import read_record
from mixlora_exp.results.build import RESULTS
from mixlora_exp.results.tables.parts import Block, Entry, Table

PAPER = RESULTS / "paper"
FIVE = ("arc_e", "arc_c", "boolq", "obqa", "piqa")
LLAMA = ("model=llama2_7b", "task=multi", "data=hub")
SMALL = ("model=smollm2_135m", "task=multi", "data=local", "data.path=d")


def block(table: Table, *words: str) -> Block:
    found = [b for b in table.blocks if all(word in b.heading for word in words)]
    assert len(found) == 1, [b.heading for b in table.blocks]
    return found[0]


def row(found: Block, *label: str) -> dict[str, Entry]:
    (line,) = [line for line in found.rows if line.label == label]
    return dict(zip(found.columns, line.cells, strict=True))


def five(value: float) -> dict[str, float]:
    return {task: value + 0.05 * i for i, task in enumerate(FIVE)}


def link(source: Path) -> Callable[[dict], None]:
    """Make a record that of an adapter that the run in `source` trained."""
    record = read_record(source / "record.json")

    def change(other: dict) -> None:
        kept = ("name", "fingerprint", "content_sha256", "config", "data", "model", "kernel",
                "dtype")  # fmt: skip
        trained_by = {**{k: record[k] for k in kept}, "git": record["provenance"]["git"]}
        other["adapter"] = {"path": "x", "sha256": "a", "trained_by": trained_by}
        other["kernel"] = record["kernel"]

    return change
