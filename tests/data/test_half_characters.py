"""Texts that are no UTF-8, half a character for one: named with file, line and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rows_on_disk import GOOD, local, refusal, write_lines

from mixlora_exp.config.schema import TASK_NAMES, AnswerKind, CustomTask, DataConfig, DataSource
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.tasks.embedded import rows as embedded_rows

HALF = "Wet \ud800 it."


def fields_of(row: Any, where: str = "") -> list[str]:
    """The places of all texts in a row, as errors name them."""
    if isinstance(row, str):
        return [where]
    if isinstance(row, dict):
        return [p for k, v in row.items() for p in fields_of(v, f"{where}.{k}".lstrip("."))]
    if isinstance(row, list):
        return [p for i, v in enumerate(row) for p in fields_of(v, f"{where}[{i}]")]
    return []


def broken_at(row: Any, place: str, where: str = "") -> Any:
    """The row with half a character in one of its texts."""
    if where == place and isinstance(row, str):
        return row + "\udfff"
    if isinstance(row, dict):
        return {k: broken_at(v, place, f"{where}.{k}".lstrip(".")) for k, v in row.items()}
    if isinstance(row, list):
        return [broken_at(v, place, f"{where}[{i}]") for i, v in enumerate(row)]
    return row


@pytest.mark.parametrize("task", TASK_NAMES)
def test_half_a_character_is_named_with_file_line_and_field(task: str, tmp_path: Path) -> None:
    good = {name: v for name, v in embedded_rows(task, "test", 0)[0].items() if name != "facts"}
    # A field that no task reads is hashed all the same.
    good["note"] = [{"by": "x"}]
    places = fields_of(good)
    assert "note[0].by" in places
    assert len(places) > 3
    for name in places:
        file = write_lines(tmp_path / task / "test.jsonl", good, broken_at(good, name))
        message = refusal(local(tmp_path), task, "test")
        assert f"{file}:2: " in message
        assert f"field '{name}' contains half a character (U+DFFF)" in message
        assert message.isprintable()
    write_lines(tmp_path / task / "test.jsonl", {**good, "\ud800": "x"})
    assert ":1: " in refusal(local(tmp_path), task, "test")


def test_half_a_character_in_bytes_and_in_a_task_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "quiz" / "test.jsonl"
    file.parent.mkdir()
    # Each half on its own in UTF-8, as some programs write it.
    file.write_bytes(b'{"q": "a \xed\xa0\x80 b", "o": ["x", "y"], "a": 0}\n')
    own = CustomTask(question="q", options=["o"], answer="a", answer_as=AnswerKind.index)
    with pytest.raises(UserError, match=r"test\.jsonl:1: .*field 'q' contains half"):
        load_split(local(tmp_path), "quiz", "test", {"quiz": own})


def test_half_a_character_in_generated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [GOOD, {**GOOD, "x": HALF}]
    monkeypatch.setattr("mixlora_exp.tasks.embedded.rows", lambda *_: drawn)
    with pytest.raises(UserError, match=r"piqa/test\?seed=0 row 2: .*field 'x' contains half"):
        load_split(DataConfig(name=DataSource.embedded), "piqa", "test")


def not_utf8(texts: list[bytes]) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts).buffers())


def test_a_parquet_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    columns = {name: [value, value] for name, value in GOOD.items()}
    columns["sol2"] = not_utf8([b"good", b"bad \xed\xa0\x80"])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "piqa" / "train.parquet")
    message = refusal(local(tmp_path))
    assert "train.parquet row 2: field 'sol2' is not UTF-8 text" in message


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.usefixtures("hub_cache")
def test_half_a_character_in_a_mirror(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "baber" / "piqa"
    if kind == "jsonl":
        write_lines(folder / "piqa_train.jsonl", GOOD, {**GOOD, "sol2": HALF})
        write_lines(folder / "piqa_validation.jsonl", GOOD)
    else:
        folder.mkdir(parents=True)
        columns = {name: [value, value] for name, value in GOOD.items()}
        columns["sol2"] = not_utf8([b"good", b"bad \xed\xa0\x80"])
        for split in ("train", "validation"):
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"piqa_{split}.parquet")
    message = refusal(DataConfig(name=DataSource.hub, mirror=str(tmp_path)))
    assert "piqa" in message
    assert ("row 2: " if kind == "parquet" else "piqa_train.jsonl:2: ") in message
    assert "field 'sol2'" in message
