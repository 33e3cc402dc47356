"""What two runs are compared by, and tables that are split to fit a terminal."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mixlora_exp.records.layout import EDGE, FRAME, SHORTEST_LABEL, Column, Sheet, fitted
from mixlora_exp.records.outcome import outcome, outcomes


def write(folder: Path, *, train: dict | None = None, **changes: object) -> dict:
    record = {
        "provenance": {"git": None}, "seconds": 1.0, "scoring": {}, "content_sha256": "a",
        "config": {"seed": 3, "output_dir": str(folder)}, "train": train, "scores": [1], **changes,
    }  # fmt: skip
    (folder / "predictions").mkdir(parents=True)
    (folder / "predictions" / "b.jsonl").write_bytes(b"b")
    (folder / "predictions" / "a.jsonl").write_bytes(b"a")
    (folder / "train_log.jsonl").write_bytes(b"log")
    (folder / "record.json").write_text(json.dumps(record))
    return record


def test_an_outcome_has_neither_time_nor_place(tmp_path: Path) -> None:
    write(tmp_path / "one", seconds=2.0, train={"steps": 4, "seconds": 1.0, "processes": 2})
    (tmp_path / "one" / "adapter").mkdir()
    (tmp_path / "one" / "adapter" / "adapter_model.safetensors").write_bytes(b"w")
    found = outcome(tmp_path / "one")
    assert found["record"] == {"config": {"seed": 3}, "train": {"steps": 4}, "scores": [1]}
    contents = {
        "train_log.jsonl": b"log", "adapter/adapter_model.safetensors": b"w",
        "predictions/a.jsonl": b"a", "predictions/b.jsonl": b"b",
    }  # fmt: skip
    assert found["files"] == {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()}
    write(tmp_path / "two")
    (tmp_path / "unfinished").mkdir()
    both = outcomes(tmp_path)
    assert set(both) == {"one", "two"}
    assert both["one"] == found
    assert both["two"]["record"]["train"] is None
    assert "adapter/adapter_model.safetensors" not in both["two"]["files"]


def sheet(label: str, *figures: str, summed: bool = False) -> Sheet:
    columns = [Column(f"{k}\n{figure}", [figure, "1"]) for k, figure in enumerate(figures)]
    return Sheet("title", Column("task", [label, "b"]), columns, summed=summed)


def printed(made: Sheet, width: int) -> list[list[str]]:
    """The lines of each of its tables."""
    found = []
    for table in fitted(made, width):
        stream = io.StringIO()
        Console(file=stream, width=300).print(table)
        found.append(stream.getvalue().splitlines())
    return found


def test_a_column_is_as_wide_as_its_widest_text() -> None:
    assert Column("a\nlonger", ["123", "1"]).width == 6
    assert Column("a", ["1234", "1"]).width == 4
    assert Column("名前", []).width == 4, "two characters of double width"
    assert Column("", []).width == 0


def test_columns_are_split_where_the_width_ends() -> None:
    made = sheet("label", "1234", "56789", "1234")
    label, widths = 5, (4, 5, 4)
    whole = EDGE + FRAME + label + sum(FRAME + width for width in widths)
    (lines,) = printed(made, whole)
    assert {len(line) for line in lines} == {whole}
    first, second = printed(made, whole - 1)
    assert {len(line) for line in first} == {whole - FRAME - 4}
    assert {len(line) for line in second} == {EDGE + FRAME + label + FRAME + 4}
    assert len(printed(made, 0)) == 3, "at least one column each"
    assert len(printed(made, whole + 1)) == 1


@pytest.mark.parametrize(("room", "label"), [(20, 20), (19, 19), (9, 9), (8, 8), (7, 8), (0, 8)])
def test_labels_are_folded_before_a_figure_is(room: int, label: int) -> None:
    width = EDGE + FRAME + room + FRAME + 4
    (lines,) = printed(sheet("x" * 20, "1234"), width)
    assert {len(line) for line in lines} == {EDGE + FRAME + label + FRAME + 4}
    assert "".join(lines).count("x") == 20
    assert any("1234" in line for line in lines)
    assert SHORTEST_LABEL == 8


def test_a_line_stands_above_the_last_row_of_a_summed_sheet() -> None:
    (plain,), (summed,) = (printed(sheet("a", "12", summed=s), 80) for s in (False, True))
    assert len(summed) == len(plain) + 1
    assert summed[-3].startswith("├")
    assert "b" in summed[-2]
