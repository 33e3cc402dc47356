"""What a run that was killed after its record left behind goes when the same command is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mixlora_exp.records.files import RECORD
from mixlora_exp.runs.finished import remove_leftovers
from mixlora_exp.runs.ownership import FAILURE, LOCK
from mixlora_exp.system import runlock
from mixlora_exp.system.runlock import RunLock

KEPT = ["adapter/README.md", "predictions/arc_e.jsonl", "train_log.jsonl"]
LEFT = [
    "checkpoints/step-00000002/state.json", "trainer/x", FAILURE, ".record.json.0a1b2c3d.tmp",
    "adapter/.README.md.0a1b2c3d.tmp",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*KEPT, *LEFT, "record.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_what_it_no_longer_needs_is_removed(folder: Path) -> None:
    remove_leftovers(folder)
    assert names(folder) == {*KEPT, "record.json"}
    assert not (folder / "checkpoints").exists()
    assert not (folder / LOCK).exists()


def test_links_are_removed_and_not_followed(folder: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").write_text("x")
    shutil.rmtree(folder / "trainer")
    (folder / "trainer").symlink_to(elsewhere)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to(elsewhere / "nowhere")
    remove_leftovers(folder)
    assert {p.name for p in folder.iterdir()} == {*(k.partition("/")[0] for k in KEPT), RECORD}
    assert (elsewhere / "file").exists()


def test_the_lock_of_a_process_that_ended_is_removed(folder: Path) -> None:
    """Also the file that it was writing, and whatever else has a number in its name."""
    remove_leftovers(folder)
    (folder / LOCK).mkdir()
    ended = json.dumps({**runlock._this_process(), "pid": 2**22 + 1, "count": 3})
    for name in ("1", ".1.4194305.0a1b2c3d"):
        (folder / LOCK / name).write_text(ended)
    remove_leftovers(folder)
    assert not (folder / LOCK).exists()


def test_one_that_cannot_be_removed_keeps_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.name == FAILURE:
            raise OSError(5, "Input/output error")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    remove_leftovers(folder)
    assert names(folder) == {*KEPT, FAILURE, "record.json"}


def test_nothing_is_removed_while_another_process_repeats_it(folder: Path) -> None:
    with RunLock(folder / LOCK) as lock:
        assert lock.acquire()
        remove_leftovers(folder)
        assert names(folder) >= {*KEPT, *LEFT}


def test_nothing_is_removed_once_there_is_no_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process began anew before this one had the lock."""
    take = RunLock.take

    def late(self: RunLock) -> bool:
        (folder / "record.json").unlink()
        return take(self)

    monkeypatch.setattr(RunLock, "take", late)
    remove_leftovers(folder)
    assert names(folder) == {*KEPT, *LEFT}


def test_a_folder_that_cannot_be_written_is_left_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: RunLock) -> bool:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(RunLock, "take", refused)
    remove_leftovers(folder)
    assert names(folder) == {*KEPT, *LEFT, "record.json"}
