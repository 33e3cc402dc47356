"""Runs in one file: what goes in comes out, the same file each time, and nothing else gets in."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from opens import opens_below

from mixlora_exp.errors import SCREEN, UserError
from mixlora_exp.records.files import (
    FORCED,
    RECORD,
    RunFiles,
    find_record,
    pack,
    record_paths,
)
from mixlora_exp.records.record import read_record
from mixlora_exp.results.build import gather, table_files
from mixlora_exp.results.collect import collect
from mixlora_exp.results.runs import check_run, load_runs
from mixlora_exp.system.untrusted import LIMIT

Write = Callable[..., Path]
SMALL = ("model=smollm2_135m", "task=arc_e", "data=embedded", "method=lora")
PREDICTIONS = "predictions/arc_e.label_logits.jsonl"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    """A run's folder, `out/a`."""
    return write(tmp_path / "out", "a", SMALL, {"arc_e": 0.5})


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """The same run, packed."""
    assert collect(tmp_path / "out", tmp_path / "runs").packed == ["a"]
    return tmp_path / "runs" / "a.zip"


def rewritten(path: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> Path:
    """The packed file made anew by a hand that is not ours."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        change(archive, files)
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_each_file_is_read_once(folder: Path, tmp_path: Path, write: Write) -> None:
    """By packing a run, and by building the tables, which compare its items many times."""
    with opens_below(folder) as found:
        assert collect(tmp_path / "out", tmp_path / "runs").packed == ["a"]
    assert found == {RECORD: 1, PREDICTIONS: 1}
    write(tmp_path / "runs", "b", (*SMALL, "seed=7"), {"arc_e": 0.6})
    with opens_below(tmp_path / "runs") as found:
        results = gather(tmp_path)
    assert [run.name for run in results.runs] == ["a", "b"]
    assert found == {"a.zip": 1, f"b/{RECORD}": 1, f"b/{PREDICTIONS}": 1}


def test_bytes_come_back_and_the_same_run_is_the_same_file(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    for name in (RECORD, PREDICTIONS):
        assert RunFiles(packed).read(name) == (folder / name).read_bytes()
    assert read_record(packed) == read_record(folder / RECORD)
    first = packed.read_bytes()
    packed.unlink()
    os.utime(folder / RECORD, (0, 0))
    collect(tmp_path / "out", tmp_path / "runs")
    assert packed.read_bytes() == first
    assert b"\x00\x00!\x00" in first[:16], "the beginning of ZIP's time, whenever it is written"


def test_tables_do_not_depend_on_how_runs_are_kept(write: Write, results: Path) -> None:
    words = ("model=smollm2_135m", "task=multi", "data=local", "data.path=d")
    for seed in (1, 2):
        for method in ("lora", "mixlora"):
            scores = {task: 0.4 + 0.1 * seed for task in ("arc_e", "boolq")}
            run = [*words, f"method={method}", f"seed={seed}"]
            write(results / "runs", f"{method}-{seed}", run, scores)
    loose = table_files(gather(results))
    assert len(collect(results / "runs", results / "runs").packed) == 4
    assert {path.suffix for path in (results / "runs").iterdir()} == {".zip"}
    assert table_files(gather(results)) == loose
    assert any("lora-1" in content for content in loose.values())


def test_folders_that_lie_among_the_packed_are_packed(write: Write, tmp_path: Path) -> None:
    """Also one that was packed and not yet removed, and one that was forced in."""
    runs = tmp_path / "runs"
    dirty = {"commit": "c" * 40, "dirty": True}
    marked = write(runs, "forced", SMALL, {"arc_e": 0.5}, git=dirty)
    (marked / FORCED).write_text('{"reasons": ["uncommitted changes"]}')
    write(runs, "dirty", SMALL, {"arc_e": 0.5}, git=dirty)
    write(runs, "a", SMALL, {"arc_e": 0.5})
    write(tmp_path / "out", "a", SMALL, {"arc_e": 0.5})
    pack(runs / "a.zip", {name: (runs / "a" / name).read_bytes() for name in (RECORD, PREDICTIONS)})
    left_out = {entry.name: entry.reason for entry in load_runs(runs)[1]}
    assert "exists twice" in left_out["a"]
    found = collect(runs, runs)
    assert (found.packed, found.known) == (["forced"], 1)
    assert [entry.name for entry in found.refused] == ["dirty"]
    assert {path.name for path in runs.iterdir()} == {"a.zip", "forced.zip", "dirty"}
    assert RunFiles(runs / "forced.zip").has(FORCED)
    assert [run.name for run in load_runs(runs)[0]] == ["a", "forced"]


def test_a_folder_stays_where_the_packed_run_is_another_or_damaged(
    write: Write, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    write(tmp_path / "out", "a", SMALL, {"arc_e": 0.4})
    collect(tmp_path / "out", runs)
    write(runs, "a", SMALL, {"arc_e": 0.5})
    assert "has another result" in collect(runs, runs).refused[0].reason
    same = write(runs, "a", SMALL, {"arc_e": 0.4})
    rewritten(runs / "a.zip", lambda archive, files: files.pop(PREDICTIONS))
    assert "cannot be read" in collect(runs, runs).refused[0].reason
    assert (same / RECORD).is_file()


KILLED = """
import os, signal, sys
from pathlib import Path
def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "fsync":
    os.fsync = die
else:
    Path.replace = die
from mixlora_exp.results.collect import collect
collect(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_nothing_that_counts(moment: str, folder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = [sys.executable, "-c", KILLED, moment, str(folder.parent), str(runs)]
    assert subprocess.run(words, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert len(list(runs.iterdir())) == 1, "it had begun to write"
    assert record_paths(runs) == []
    assert load_runs(runs) == ([], [])
    assert collect(folder.parent, runs).packed == ["a"]
    assert [path.name for path in runs.iterdir()] == ["a.zip"]
    assert [run.name for run in load_runs(runs)[0]] == ["a"]


def test_what_is_read_back_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {RECORD: b"{}"}
    monkeypatch.setattr("mixlora_exp.records.files._unpacked", lambda archive, name: b"{ }")
    with pytest.raises(UserError, match="read back differs from .*; nothing was recorded"):
        pack(tmp_path / "a.zip", files)
    assert list(tmp_path.iterdir()) == []


def twice(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    archive.writestr(RECORD, b"{}")


def many(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    files.update({f"{number}": b"" for number in range(1001)})


def other_method(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    archive.writestr(RECORD, files.pop(RECORD), zipfile.ZIP_LZMA)


def bomb(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    files[RECORD] = b" " * 17 * 2**20


def no_record(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    files["deep/" + RECORD] = files.pop(RECORD)


def other_predictions(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    files[PREDICTIONS] = files[PREDICTIONS].replace(b'"prediction": 1', b'"prediction": 0', 1)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (twice, "or a file twice"),
        (many, "more than 1000 files"),
        (other_method, "encrypted or compressed with an unsupported"),
        (bomb, "has more than 16 MiB"),
        (no_record, "not in the packed file"),
        (other_predictions, "contradicts the accuracy"),
    ],
)
def test_files_made_by_others_are_refused(
    change: Callable, reason: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "16")
    rewritten(packed, change)
    runs, (left_out,) = load_runs(packed.parent)
    assert not runs
    assert reason in left_out.reason


def test_a_size_that_lies_unpacks_no_more(packed: Path) -> None:
    """64 MiB of zeros that are said to be ten bytes: no more than these are unpacked."""
    rewritten(packed, lambda archive, files: files.update({RECORD: b"0" * 64 * 2**20}))
    content = bytearray(packed.read_bytes())
    # It stands in the file's own header and in the list at the end.
    size = (64 * 2**20).to_bytes(4, "little")
    while size in content:
        at = content.index(size)
        content[at : at + 4] = (10).to_bytes(4, "little")
    packed.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match="is not a record"):
        read_record(packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20, "a buffer for the packed file, and no more"


def test_links_and_names_from_inside_lead_nowhere(packed: Path, tmp_path: Path) -> None:
    def climbing(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
        files["../../escaped"] = files["/escaped"] = b"x"

    rewritten(packed, climbing)
    check_run(RunFiles(packed))
    assert not list(tmp_path.rglob("escaped"))
    packed.rename(tmp_path / "elsewhere.zip")
    packed.symlink_to(tmp_path / "elsewhere.zip")
    assert "is a link, which is not followed" in load_runs(packed.parent)[1][0].reason


def test_a_damaged_file_has_nothing(packed: Path) -> None:
    assert RunFiles(packed).has(RECORD)
    packed.write_bytes(packed.read_bytes()[:40])
    assert not RunFiles(packed).has(RECORD)


def test_damaged_bytes_are_one_clause_or_change_nothing(packed: Path) -> None:
    """Any byte may be another one: the run is refused in words, or is read as it was."""
    whole, draw = packed.read_bytes(), random.Random(0)
    record = read_record(packed)
    for number in range(300):
        content = bytearray(whole)
        if number % 3:
            for _ in range(number % 4 + 1):
                content[draw.randrange(len(content))] = draw.randrange(256)
        else:
            del content[draw.randrange(len(content)) :]
        packed.write_bytes(content)
        runs, left_out = load_runs(packed.parent)
        assert len(runs) + len(left_out) == 1
        if runs:
            assert runs[0].record == record
        else:
            assert left_out[0].reason.isprintable()
            assert len(left_out[0].reason) <= SCREEN


def test_committed_runs_are_whole_and_packed_alike() -> None:
    paths = record_paths(ROOT / "results" / "runs")
    assert len(paths) > 90
    for path in paths:
        assert path.suffix == ".zip", "`python scripts/collect.py --source=results/runs` packs it"
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            record = read_record(path)
            assert archive.namelist()[0] == RECORD
            assert set(archive.namelist()) <= {RECORD, FORCED, *record["predictions"].values()}
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_record_can_be_looked_at(packed: Path, folder: Path) -> None:
    def shown(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/show.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert shown(str(packed)).stdout == (folder / RECORD).read_text()
    items = shown(str(folder), f"--file={PREDICTIONS}").stdout
    assert items == (folder / PREDICTIONS).read_text()
    done = shown("nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere is not a run" in done.stderr


def test_a_packed_run_begins_with_its_record_and_has_no_time(tmp_path: Path) -> None:
    """Whatever object holds the name, and by a date that other programs read."""
    path = tmp_path / "run.zip"
    pack(path, {"a.jsonl": b"a", "".join(["record", ".json"]): b"{}", FORCED: b"[]"})
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [RECORD, "a.jsonl", FORCED]
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.compress_type == zipfile.ZIP_DEFLATED
            assert (entry.create_system, entry.external_attr >> 16) == (3, 0o100644)


def test_a_file_of_another_name_is_no_run(packed: Path) -> None:
    assert find_record(str(packed)) == packed
    for name in ("settings.json", "a.json", "record.jsonl"):
        other = packed.with_name(name)
        other.write_bytes(packed.read_bytes())
        with pytest.raises(UserError, match="is not a run"):
            find_record(str(other))
