"""Collecting: what may be copied is, and the rest is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.records.files import FORCED, RECORD, RunFiles, pack, record_paths
from mixlora_exp.results.build import gather, table_files
from mixlora_exp.results.collect import collect
from mixlora_exp.results.runs import load_runs

Write = Callable[..., Path]
CLEAN = {"commit": "c" * 40, "dirty": False}
SMALL = ("model=smollm2_135m", "task=arc_e", "data=embedded", "method=lora")


def test_finished_runs_are_packed_once(write: Write, tmp_path: Path) -> None:
    source, target = tmp_path / "outputs", tmp_path / "runs"
    folder = write(source, "a", SMALL, {"arc_e": 0.5})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (source / "unfinished").mkdir()
    assert collect(source, target).packed == ["a"]
    assert [path.name for path in target.iterdir()] == ["a.zip"]
    with ZipFile(target / "a.zip") as packed:
        assert packed.namelist() == ["record.json", "predictions/arc_e.label_logits.jsonl"]
    assert [run.name for run in load_runs(target)[0]] == ["a"]
    again = collect(source, target)
    assert (again.packed, again.known, again.refused) == ([], 1, [])


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
    assert found.packed == ["good"]
    assert {entry.name for entry in found.refused} == {"dirty", "cut", "lost"}
    assert found.random == 1
    assert [path.name for path in target.iterdir()] == ["good.zip"]


def test_a_hidden_run_beside_the_real_one_counts_nowhere(
    write: Write, results: Path, tmp_path: Path
) -> None:
    """Whole as it may be, a hidden name is what a killed process left. A file of `collect` is
    removed when the run is packed."""
    runs = results / "runs"
    write(runs, "a", [*SMALL, "task=multi"], FIVE)
    before = table_files(gather(results))
    other = write(tmp_path / "other", "a", [*SMALL, "task=multi"], dict.fromkeys(FIVE, 0.9))
    collect(tmp_path / "other", tmp_path / "other")
    for name in (".a.zip", ".a.zip.01234567.tmp"):
        shutil.copy(other.with_suffix(".zip"), runs / name)
    write(tmp_path, "a", [*SMALL, "task=multi"], dict.fromkeys(FIVE, 0.9)).rename(runs / ".a")
    assert record_paths(runs) == [runs / "a" / RECORD]
    assert gather(results).left_out == []
    assert table_files(gather(results)) == before
    for target in (tmp_path / "elsewhere", runs):
        found = collect(runs, target)
        assert (found.packed, found.known, found.refused) == (["a"], 0, [])
        ((run,), left_out) = load_runs(target)
        assert (run.scores["arc_e", "label_logits"]["accuracy"], left_out) == (0.5, [])
    assert sorted(path.name for path in runs.iterdir()) == [".a", ".a.zip", "a.zip"]


def test_a_kill_while_the_packed_files_are_removed_leaves_one_run(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "a", SMALL, {"arc_e": 0.5})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mixlora_exp.results.collect._remove_packed", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path, tmp_path)
    assert folder.is_dir()
    assert [run.name for run in load_runs(tmp_path)[0]] == ["a"]
    assert load_runs(tmp_path)[1] == collect(tmp_path, tmp_path).refused == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_what_was_not_packed_stays(write: Write, tmp_path: Path) -> None:
    """Such as the weights, and predictions that are not those of the packed file."""
    folder = write(tmp_path, "a", SMALL, {"arc_e": 0.5})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "predictions" / "other.jsonl").write_text("other")
    assert collect(tmp_path, tmp_path).packed == ["a"]
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"a.zip", "a/adapter/adapter_model.safetensors", "a/predictions/other.jsonl"}
    assert collect(tmp_path, tmp_path).refused == []


def test_another_result_of_the_same_name_is_refused(write: Write, tmp_path: Path) -> None:
    source, target = tmp_path / "outputs", tmp_path / "runs"
    write(target, "a", SMALL, {"arc_e": 0.4})
    write(source, "a", SMALL, {"arc_e": 0.5})
    ((entry),) = collect(source, target).refused
    assert "another result" in entry.reason
    assert load_runs(target)[0][0].scores["arc_e", "label_logits"]["accuracy"] == 0.4


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source=.*nowhere is not a folder"):
        collect(tmp_path / "nowhere", tmp_path / "runs")


CHANGED = {"commit": "c" * 40, "dirty": True, "changed": ["src/a.py"], "diff": "+x = 2"}
FIVE = {task: 0.5 for task in ("arc_e", "arc_c", "boolq", "obqa", "piqa")}


def of_other_code(record: dict) -> None:
    """Make a record that of an adapter whose training no commit gives."""
    kept = ("name", "fingerprint", "config", "data", "model", "kernel", "dtype")
    trained_by = {**{name: record[name] for name in kept}, "git": CHANGED}
    record["adapter"] = {"path": "x", "sha256": "a", "trained_by": trained_by}


@pytest.mark.parametrize(
    ("words", "git", "change", "reason"),
    [
        (SMALL, CHANGED, None, "uncommitted changes in src/a.py"),
        # From before the names were kept.
        (SMALL, {"commit": "c", "dirty": True}, None, "uncommitted changes"),
        (SMALL, None, None, "code in no git checkout"),
        (SMALL, CLEAN, of_other_code, "an adapter that was trained with uncommitted changes"),
    ],
)
def test_force_takes_what_is_refused_and_marks_it(
    words: Sequence[str],
    git: dict | None,
    change: Callable[[dict], None] | None,
    reason: str,
    write: Write,
    tmp_path: Path,
) -> None:
    source, results = tmp_path / "outputs", tmp_path / "results"
    (results / "bench").mkdir(parents=True)
    words = [*words, "task=multi"]
    write(source, "odd", words, FIVE, git=git, change=change)
    refused = collect(source, results / "runs")
    ((entry),) = refused.refused
    assert entry.reason.startswith(reason)
    assert entry.reason.endswith("--force collects it, marked")
    taken = collect(source, results / "runs", force=True)
    assert (taken.packed, taken.refused) == (["odd"], [])
    found = gather(results)
    assert found.left_out == []
    notes = [note for note in found.tables[2].notes if "odd" in note]
    assert len(notes) == 1
    assert notes[0].startswith(f"Collected by force: odd ({reason}")
    # Without the mark a record of other code counts nowhere.
    forced = results / "runs" / "odd.zip"
    record_alone = {n: RunFiles(forced).read(n) for n in ZipFile(forced).namelist() if n != FORCED}
    pack(forced, record_alone)
    assert gather(results).left_out


@pytest.mark.parametrize("git", [CLEAN, CHANGED, None])
def test_a_trial_on_random_weights_is_passed_over(
    git: dict | None, write: Write, tmp_path: Path
) -> None:
    """It is no mistake: a check of the installation leaves one."""
    source, results = tmp_path / "outputs", tmp_path / "results"
    (results / "bench").mkdir(parents=True)
    write(source, "trial", ("model=tiny", *SMALL[1:], "task=multi"), FIVE, git=git)
    found = collect(source, results / "runs")
    assert (found.packed, found.random, found.refused) == ([], 1, [])
    assert not (results / "runs").exists()
    assert collect(source, results / "runs", force=True).packed == ["trial"]
    notes = [note for note in gather(results).tables[2].notes if "trial" in note]
    assert notes[0].startswith("Collected by force: trial (")
    assert "random weights: its scores mean nothing" in notes[0]


def test_a_damaged_record_is_refused_by_force_too(write: Write, tmp_path: Path) -> None:
    folder = write(tmp_path / "outputs", "cut", SMALL, {"arc_e": 0.5})
    (folder / "record.json").write_text("{")
    found = collect(tmp_path / "outputs", tmp_path / "runs", force=True)
    assert [entry.name for entry in found.refused] == ["cut"]
