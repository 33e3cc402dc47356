"""Finding cells in tables, and runs to fill them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixlora_exp.records.record import finish_record, read_record, write_json
from mixlora_exp.results.build import RESULTS, gather
from mixlora_exp.results.tables.parts import Block, Entry, Table

PAPER = RESULTS / "paper"
FIVE = ("arc_e", "arc_c", "boolq", "obqa", "piqa")
LLAMA = ("model=llama2_7b", "task=multi", "data=hub")
SMALL = ("model=smollm2_135m", "task=multi", "data=local", "data.path=d")


def block(table: Table, *words: str) -> Block:
    found = [b for b in table.blocks if all(word in b.heading for word in words)]
    assert len(found) == 1, [b.heading for b in table.blocks]
    return found[0]


def multi_task(results: Path) -> Block:
    """What Table 2 has of SmolLM2."""
    return block(gather(results).tables[2], "SmolLM2")


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


def bench_record(
    folder: Path, name: str, rows: dict[str, Any], gpus: tuple[str, ...] = (), **config: Any
) -> None:
    """A benchmark's record, of a commit that begins as its name."""
    settings = {"model": "smollm2_135m", "layers": None, "batch": 8, "length": 128, "rounds": 16,
                "dtype": "bfloat16", "dropout": 0.05, **config}  # fmt: skip
    record = {
        "config": settings, "layers": settings["layers"] or 30, "threads": 2, "rows": rows,
        "provenance": {"git": {"commit": name[0] * 40, "dirty": False}, "packages": {"torch": "2"},
                       "hardware": {"cpu": "a cpu", "gpus": list(gpus)}},
    }  # fmt: skip
    write_json(folder / f"{name}.json", finish_record(record))
