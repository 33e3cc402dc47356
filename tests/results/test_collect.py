"""Collecting: what may be copied is, and the rest is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.results.collect import collect
from mixlora_exp.results.runs import load_runs

Write = Callable[..., Path]
SMALL = ("model=smollm2_135m", "task=arc_e", "data=embedded", "method=lora")


def test_finished_runs_are_copied_once(write: Write, tmp_path: Path) -> None:
    source, target = tmp_path / "outputs", tmp_path / "runs"
    folder = write(source, "a", SMALL, {"arc_e": 0.5})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (source / "unfinished").mkdir()
    assert collect(source, target).copied == ["a"]
    files = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert files == {"a/record.json", "a/predictions/arc_e.label_logits.jsonl"}
    assert [run.name for run in load_runs(target)[0]] == ["a"]
    again = collect(source, target)
    assert (again.copied, again.known, again.refused) == ([], 1, [])


def test_what_no_table_could_use_is_refused(write: Write, tmp_path: Path) -> None:
    source, target = tmp_path / "outputs", tmp_path / "runs"
    dirty = {"commit": "c", "dirty": True}
    write(source, "dirty", SMALL, {"arc_e": 0.5}, git=dirty)
    cut = write(source, "cut", SMALL, {"arc_e": 0.5})
    (cut / "record.json").write_text("{")
    lost = write(source, "lost", SMALL, {"arc_e": 0.5})
    (lost / "predictions" / "arc_e.label_logits.jsonl").unlink()
    write(source, "random", ("model=tiny", *SMALL[1:]), {"arc_e": 0.5})
    write(source, "good", SMALL, {"arc_e": 0.5})
    found = collect(source, target)
    assert found.copied == ["good"]
    assert {entry.name for entry in found.refused} == {"dirty", "cut", "lost", "random"}
    assert [path.name for path in target.iterdir()] == ["good"]


def test_another_result_of_the_same_name_is_refused(write: Write, tmp_path: Path) -> None:
    source, target = tmp_path / "outputs", tmp_path / "runs"
    write(target, "a", SMALL, {"arc_e": 0.4})
    write(source, "a", SMALL, {"arc_e": 0.5})
    ((entry),) = collect(source, target).refused
    assert "another result" in entry.reason
    assert load_runs(target)[0][0].scores["arc_e", "label_logits"]["accuracy"] == 0.4


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source=.*nowhere is no folder"):
        collect(tmp_path / "nowhere", tmp_path / "runs")
