"""What a lock's files say and which of them stay, in cases that are rare and must be decided right.

Patience is long wherever an answer is due at once: a wrong one would be late.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.system import runlock
from mixlora_exp.system.runlock import KEPT, RunLock, holder_of

PATIENT = {"beat": 5.0, "patience": 20.0}
ELSEWHERE = {"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 7, "started": "1"}


def put(folder: Path, number: int, **holder: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / str(number)
    path.write_text(json.dumps({"count": 0, **holder}))
    return path


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def taken(folder: Path, **settings: float) -> tuple[bool, float]:
    """Whether a lock is free, and after how many seconds that was known."""
    lock, begun = RunLock(folder, **{**PATIENT, **settings}), time.monotonic()
    found = lock.acquire()
    seconds = time.monotonic() - begun
    lock.release()
    return found, seconds


def later(seconds: float, do: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, do)
    timer.start()
    return timer


def test_a_few_earlier_numbers_stay(tmp_path: Path) -> None:
    for _ in range(KEPT + 4):
        assert taken(tmp_path)[0]
    assert numbers(tmp_path) == list(range(4, KEPT + 5))
    put(tmp_path, 1000, released=True)
    assert taken(tmp_path)[0]
    assert numbers(tmp_path) == [*range(4, KEPT + 5), 1000, 1001], "a gap is no reason to search"


def test_a_heartbeat_counts_and_keeps_the_holder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, beat=0.01, patience=60.0)
    assert lock.acquire()
    seen, deadline = [], time.monotonic() + 10
    while len(set(seen)) < 4 and time.monotonic() < deadline:
        holder = json.loads((tmp_path / "1").read_text())
        assert holder.items() >= runlock._this_process().items()
        seen.append(holder["count"])
    lock.release()
    assert seen == sorted(seen)
    assert len(set(seen)) >= 4
    assert not lock.lost.is_set()


def test_the_first_heartbeat_is_one_beat_away(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, **PATIENT)
    assert lock.acquire()
    time.sleep(0.05)
    assert json.loads((tmp_path / "1").read_text())["count"] == 0
    lock.release()


@pytest.mark.parametrize("pid", [0, -1, "7", None, 1.5])
def test_no_process_has_such_an_id(pid: object, tmp_path: Path) -> None:
    put(tmp_path, 1, **{**runlock._this_process(), "pid": pid})
    assert holder_of(tmp_path) is None
    found, seconds = taken(tmp_path)
    assert found
    assert seconds < 10


def test_a_process_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert runlock._started(pid) is None
        put(tmp_path, 1, **{**runlock._this_process(), "pid": pid})
        assert holder_of(tmp_path) is None
        found, seconds = taken(tmp_path)
    finally:
        os.waitpid(pid, 0)
    assert found
    assert seconds < 10


@pytest.mark.parametrize("key", ["host", "boot", "namespace"])
def test_a_process_that_is_elsewhere_in_one_respect_is_not_looked_up(
    key: str, tmp_path: Path
) -> None:
    """Nor counts as dead before its time, though no process here has its id."""
    holder = {**runlock._this_process(), "pid": 2**22 + 7, key: "another"}
    put(tmp_path, 1, **holder)
    assert holder_of(tmp_path) == {"count": 0, **holder}
    found, seconds = taken(tmp_path, patience=0.3)
    assert found
    assert 0.3 <= seconds < 10


def test_a_high_count_that_stands_still_is_of_a_dead_process(tmp_path: Path) -> None:
    put(tmp_path, 1, **{**ELSEWHERE, "count": 10**6})
    assert taken(tmp_path, patience=0.3)[0]


def test_given_back_is_free_at_once(tmp_path: Path) -> None:
    path = put(tmp_path, 1, **ELSEWHERE, released=True)
    assert holder_of(tmp_path) is None
    assert taken(tmp_path)[0]
    path = put(tmp_path, 5, **ELSEWHERE)
    timer = later(0.1, lambda: path.write_text('{"released": true}'))
    found, seconds = taken(tmp_path)
    timer.join()
    assert found
    assert seconds < 10


def test_a_file_that_appears_late_is_of_one_who_lives(tmp_path: Path) -> None:
    """On a network file system a new file may be seen before its content."""
    path = tmp_path / "1"
    path.write_text("")
    timer = later(0.1, lambda: put(tmp_path, 1, **ELSEWHERE))
    found, seconds = taken(tmp_path)
    timer.join()
    assert not found
    assert seconds < 10
    assert json.loads(path.read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("name", ["٣", "³", "1²", "1٣", "9x", "9.tmp", "0x1"])
def test_other_names_are_no_numbers(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({**runlock._this_process(), "count": 0}))
    assert holder_of(tmp_path) is None
    lock = RunLock(tmp_path, **PATIENT)
    assert lock.acquire()
    assert (tmp_path / "1").exists()
    lock.discard()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_number_is_created_once(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system without hard links."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    lock, other = RunLock(tmp_path, **PATIENT), RunLock(tmp_path, **PATIENT)
    assert lock.acquire()
    assert holder_of(tmp_path) == {**runlock._this_process(), "count": 0}
    assert not other._create(1)
    assert not other.acquire()
    assert numbers(tmp_path) == [1]
    assert lock.held()
    lock.release()
    assert json.loads((tmp_path / "1").read_text())["released"] is True
    assert other.acquire()
    other.release()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, folder = Path.write_text, tmp_path / "outputs" / "run" / "lock"

    def full(self: Path, text: str) -> int:
        real(self, text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    told = rf"output_dir={tmp_path / 'outputs'} cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=told):
        RunLock(folder, **PATIENT).acquire()
    assert list(folder.iterdir()) == []


def test_leaving_the_block_gives_the_lock_back(tmp_path: Path) -> None:
    with RunLock(tmp_path, **PATIENT) as lock:
        assert lock.acquire()
        assert holder_of(tmp_path) is not None
    assert holder_of(tmp_path) is None
    lock.release()
    assert numbers(tmp_path) == [1], "a second time is nothing"


def test_discarding_what_was_not_taken_removes_nothing(tmp_path: Path) -> None:
    put(tmp_path / "other", 3, **ELSEWHERE)
    RunLock(tmp_path / "other", **PATIENT).discard()
    assert numbers(tmp_path / "other") == [3]
    (tmp_path / "empty").mkdir()
    RunLock(tmp_path / "empty", **PATIENT).discard()
    assert (tmp_path / "empty").is_dir()
    tmp_path /= "own"
    put(tmp_path, 3, released=True)
    lock = RunLock(tmp_path, **PATIENT)
    assert lock.acquire()
    put(tmp_path, 5, **ELSEWHERE)
    lock.discard()
    assert numbers(tmp_path) == [3, 4, 5], "it was taken over"


def test_what_was_given_back_cannot_be_lost(tmp_path: Path) -> None:
    lock, other = RunLock(tmp_path, **PATIENT), RunLock(tmp_path, **PATIENT)
    assert lock.acquire()
    lock.release()
    assert other.acquire()
    lock.held()
    assert not lock.lost.is_set()
    other.release()


def test_a_listing_without_the_own_file_is_no_loss(tmp_path: Path) -> None:
    """A network file system may show a new file late."""
    lock = RunLock(tmp_path, **PATIENT)
    assert lock.acquire()
    (tmp_path / "1").unlink()
    assert lock.held()
    lock.release()


def test_an_old_number_that_others_tidied_up_meanwhile_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(tmp_path, **PATIENT)

    def newest(folder: Path) -> int:
        (folder / "1").unlink(missing_ok=True)
        return 30

    monkeypatch.setattr(runlock, "_newest", newest)
    assert not lock._create(1)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_output_folder_that_went_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder, removed = runlock._newest, tmp_path / "run" / "lock", []

    def newest(place: Path) -> int:
        if not removed:
            folder.rmdir()
            removed.append(folder.parent.rmdir())
            return 0
        return real(place)

    monkeypatch.setattr(runlock, "_newest", newest)
    lock = RunLock(folder, **PATIENT)
    assert lock.acquire()
    assert numbers(folder) == [1]
    lock.release()


def test_discarding_removes_all_that_ended_holders_left(tmp_path: Path) -> None:
    """Earlier numbers, and the file that one was writing when it was killed."""
    folder = tmp_path / "lock"
    for _ in range(2):
        assert taken(folder)[0]
    mine = json.loads((folder / "1").read_text())
    put(folder, 1, **{**mine, "pid": 2**22 + 1})
    (folder / "1").rename(folder / ".3.4194305.abcd")
    lock = RunLock(folder, **PATIENT)
    assert lock.acquire()
    lock.discard()
    assert not folder.exists()


def test_discarding_leaves_what_a_living_process_writes(tmp_path: Path) -> None:
    folder = tmp_path / "lock"
    lock = RunLock(folder, **PATIENT)
    assert lock.acquire()
    (folder / ".2.1.abcd").write_bytes((folder / "1").read_bytes())
    lock.discard()
    assert [path.name for path in folder.iterdir()] == [".2.1.abcd"]


def test_a_folder_that_went_and_came_back_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has removed it, and a third one made it anew before this one does."""
    lock = RunLock(tmp_path, **PATIENT)
    create, asked = lock._create, []

    def gone_once(number: int) -> bool:
        asked.append(number)
        if len(asked) == 1:
            raise FileNotFoundError(2, "No such file or directory", str(tmp_path))
        return create(number)

    monkeypatch.setattr(lock, "_create", gone_once)
    assert lock.acquire()
    lock.release()


def test_where_the_system_has_no_proc_a_living_holder_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, where start times come from psutil."""
    monkeypatch.setattr(
        runlock, "Path", lambda name: Path(str(name).replace("/proc/", f"{tmp_path}/no/"))
    )
    holder = RunLock(tmp_path / "lock", **PATIENT)
    assert holder.acquire()
    assert holder_of(tmp_path / "lock")["started"] == str(psutil.Process().create_time())
    assert not taken(tmp_path / "lock")[0]
    holder.release()
