"""Records of other people: what is copied, shown and drawn of them, and what stays where it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE, changed, place, set_field

from mixlora_exp.errors import SCREEN
from mixlora_exp.results.build import gather, table_files, write_report
from mixlora_exp.results.collect import collect
from mixlora_exp.results.runs import load_runs
from mixlora_exp.results.tables.latency import load_benchmarks
from mixlora_exp.sweeps.status import find_cells
from mixlora_exp.system.untrusted import LIMIT

Write = Callable[..., Path]
SMALL = ("model=smollm2_135m", "task=arc_e", "data=embedded", "method=lora")
PREDICTIONS = "predictions/arc_e.label_logits.jsonl"


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "2")


@pytest.fixture
def source(write: Write, tmp_path: Path) -> Path:
    """A folder with one run that may be collected, `a`."""
    write(tmp_path / "out", "a", SMALL, {"arc_e": 0.5})
    return tmp_path / "out"


def refused(source: Path, target: Path) -> str:
    """Why the one run there is not collected; nothing is written and nothing else is read."""
    before = {path for path in target.parent.rglob("*") if target not in path.parents}
    found = collect(source, target)
    assert (found.packed, found.known, len(found.refused)) == ([], 0, 1)
    assert {path for path in target.parent.rglob("*") if target not in path.parents} == before
    assert not list(target.glob("**/*"))
    assert not load_runs(source)[0]
    reason = found.refused[0].reason
    assert reason.isprintable()
    assert len(reason) <= SCREEN
    return reason


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["record.json", PREDICTIONS])
def test_hostile_files_are_refused_by_name(
    kind: str, name: str, source: Path, tmp_path: Path
) -> None:
    place(kind, source / "a" / name)
    refused(source, tmp_path / "runs")


@pytest.mark.parametrize(
    "named",
    ["../../../src/code.py", "../b/record.json", "/etc/passwd", "predictions/../record.json",
     "predictions/arc_e.answer_text.jsonl", "record.json", ".", ""],
)  # fmt: skip
def test_only_what_a_run_writes_is_copied(named: str, source: Path, tmp_path: Path) -> None:
    """Under the scored key, and under one that no score has."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("code")
    for key in ("arc_e/label_logits", "other/label_logits", "../x/y"):
        changed(source / "a", lambda record, key=key: record["predictions"].update({key: named}))
        assert "is not a file that a run writes" in refused(source, tmp_path / "runs")
        own = {"arc_e/label_logits": PREDICTIONS}
        changed(source / "a", lambda record, own=own: record.update(predictions=own))
    assert (tmp_path / "src" / "code.py").read_text() == "code"
    assert collect(source, tmp_path / "runs").packed == ["a"]


def linked_run(source: Path) -> None:
    (source / "a").rename(source.parent / "elsewhere")
    (source / "a").symlink_to(source.parent / "elsewhere")


def linked_record(source: Path) -> None:
    (source / "a" / "record.json").rename(source.parent / "r.json")
    (source / "a" / "record.json").symlink_to(source.parent / "r.json")


def linked_folder(source: Path) -> None:
    (source / "a" / "predictions").rename(source.parent / "elsewhere")
    (source / "a" / "predictions").symlink_to(source.parent / "elsewhere")


def linked_file(source: Path) -> None:
    (source / "a" / PREDICTIONS).rename(source.parent / "p.jsonl")
    (source / "a" / PREDICTIONS).symlink_to(source.parent / "p.jsonl")


@pytest.mark.parametrize("link", [linked_run, linked_record, linked_folder, linked_file])
def test_links_are_not_followed(link: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    link(source)
    assert "is a link, which is not followed" in refused(source, tmp_path / "runs")


def test_one_file_under_two_names_is_a_file(source: Path, tmp_path: Path) -> None:
    os.link(source / "a" / PREDICTIONS, tmp_path / "again")
    assert collect(source, tmp_path / "runs").packed == ["a"]


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "<img src=x>", "a|b", "a`b", "-x", "a\nb", "é"])
def test_a_run_is_called_as_runs_are(name: str, source: Path, tmp_path: Path) -> None:
    (source / "a").rename(source / name)
    found = collect(source, tmp_path / "runs")
    assert not found.packed
    assert found.refused[0].name.isprintable()
    assert "folder's name" in found.refused[0].reason


ODD_ROWS: list[Any] = [
    [], 3, {}, {"id": "a"}, {"id": [1], "answer": 0, "prediction": 0},
    {"id": "a", "answer": "0", "prediction": 0}, {"id": "a", "answer": 0, "prediction": True},
    {"id": "a", "answer": 0, "prediction": 0, "gold_log_likelihood": "x"},
]  # fmt: skip


@pytest.mark.parametrize("row", ODD_ROWS)
def test_odd_predictions_are_refused(row: Any, source: Path, tmp_path: Path) -> None:
    path = source / "a" / PREDICTIONS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")
    assert PREDICTIONS in refused(source, tmp_path / "runs")


TAGS = "<img src=x onerror=alert(1)>[a](javascript:b)|`c`$\\frac$&\x1b[31m\u202e"


def test_texts_of_records_are_shown_as_texts(write: Write, results: Path, tmp_path: Path) -> None:
    """In the tables, in the figures, in the report: wherever a record's own text comes in."""

    def change(record: dict[str, Any]) -> None:
        record["config"]["model"]["revision"] = TAGS
        record["config"]["model"]["hub_id"] = TAGS
        record["provenance"]["hardware"] = {"cpu": TAGS, "gpus": [TAGS]}
        record["provenance"]["packages"]["torch"] = TAGS
        record["provenance"]["git"] = {"commit": TAGS, "dirty": False}
        record["dtype"] = TAGS

    write(results / "runs", "a", SMALL, {"arc_e": 0.5}, change=change)
    write(results / "runs", "b", SMALL, {"arc_e": 0.4}, change=set_field("status", TAGS))
    found = gather(results)
    assert [run.name for run in found.runs] == ["a"]
    files = table_files(found)
    assert any("javascript" in content for content in files.values())
    for name, content in files.items():
        assert all(line.isprintable() for line in content.splitlines()), name
        if name.endswith(".md"):
            assert "<img" not in content
            assert "](javascript" not in content
    page = write_report(found, tmp_path).read_text()
    assert "javascript" in page
    assert "<img src=x" not in page
    assert all(line.isprintable() for line in page.replace("\t", "").splitlines())


@pytest.mark.parametrize("kind", HOSTILE)
def test_benchmarks_and_records_leave_out_what_they_cannot_read(
    kind: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "bench").mkdir()
    place(kind, tmp_path / "bench" / "x.json")
    found, left_out = load_benchmarks(tmp_path / "bench")
    assert not found
    assert [entry.name for entry in left_out] == ["bench/x"]
    place(kind, source / "a" / "record.json")
    runs, left_out = load_runs(source)
    assert not runs
    assert len(left_out) == 1


def test_tables_read_timings_and_pass_over_counted_bytes() -> None:
    """Of the committed ones, of which none is left out for its kind."""
    found, left_out = load_benchmarks(Path(__file__).parents[2] / "results" / "bench")
    assert {entry.reason for entry in left_out} <= {"it was measured with uncommitted changes"}
    names = {entry["name"] for entry in found}
    assert "methods-smollm2_135m" in names
    assert not any(name.startswith("bytes-") for name in names)


def test_status_passes_over_and_shows_nothing_harmful(tmp_path: Path) -> None:
    words = ["model=tiny", "data=embedded", "method=lora", "task=arc_e", f"output_dir={tmp_path}"]
    name = "figure4c"
    (cell,) = find_cells([name], words, tmp_path / "records", patience=0.0)
    folder = tmp_path / cell.name
    for number, kind in enumerate(HOSTILE):
        place(kind, tmp_path / "records" / str(number) / "record.json")
    place("escapes", folder / "failure.json")
    (folder / "failure.json").write_text(json.dumps({"error": TAGS}))
    (cell,) = find_cells([name], words, tmp_path / "records", patience=0.0)
    assert cell.state == "failed"
    assert cell.detail.isprintable()
    for kind in HOSTILE:
        (folder / "failure.json").unlink(missing_ok=True)
        if kind != "a folder":
            place(kind, folder / "record.json")
            (cell,) = find_cells([name], words, tmp_path / "none", patience=0.0)
            assert cell.state in ("refused", "missing")
            assert cell.detail.isprintable()
            (folder / "record.json").unlink()


def test_json_is_read_in_one_place() -> None:
    """The package's files read JSON through `untrusted` alone, but for what they, PEFT or a
    tokenizer just wrote, for the command line, and for what stands beside a YAML of conf."""
    package = Path(__file__).parents[2] / "src" / "mixlora_exp"
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "json.loads(" in path.read_text() or "json.load(" in path.read_text()
    }
    assert users <= {
        "system/untrusted.py", "sweeps/ledger.py", "sweeps/study.py", "runs/state.py",
        "results/cells.py", "results/condition_text.py",
        "bench/memory.py", "bench/several_memory.py",
        "bench/kinds/peers.py", "bench/peers_worker.py", "results/tables/stability.py",
        "results/tables/switches.py", "adapters/build.py", "models/special_tokens.py",
        "models/vocabulary.py", "cli/lm_eval.py", "config/architecture.py",
        "adapters/base_check.py",
    }  # fmt: skip
