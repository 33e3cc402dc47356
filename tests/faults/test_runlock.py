"""One process at a time on a run, whatever happens to the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mixlora_exp.runs import ownership
from mixlora_exp.system import runlock
from mixlora_exp.system.runlock import RunLock, holder_of

FAST = {"beat": 0.05, "patience": 0.4}
# What they compute needs nothing that a fork would break, and imports take seconds.
CONTEXT = multiprocessing.get_context("fork")


def test_taken_once_and_free_again(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path, **FAST), RunLock(tmp_path, **FAST)
    assert first.acquire()
    assert not second.acquire()
    assert holder_of(tmp_path)["pid"] == os.getpid()
    first.release()
    assert holder_of(tmp_path) is None
    assert second.acquire()
    second.release()


def hold(folder: str, ready, seconds: float) -> None:
    lock = RunLock(Path(folder), **FAST)
    ready.put(lock.acquire())
    time.sleep(seconds)


def test_a_dead_process_of_this_machine_is_detected_at_once(tmp_path: Path) -> None:
    ready = CONTEXT.Queue()
    process = CONTEXT.Process(target=hold, args=(str(tmp_path), ready, 60))
    process.start()
    assert ready.get(timeout=60)
    lock = RunLock(tmp_path, beat=5.0, patience=60.0)
    start = time.monotonic()
    assert not lock.acquire()
    process.kill()
    process.join()
    assert lock.acquire()
    assert time.monotonic() - start < 10
    lock.release()


def foreign(folder: Path, **changes) -> Path:
    """A lock file that a process on another machine left."""
    folder.mkdir(exist_ok=True)
    holder = {"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 7, "started": 1.0,
              "count": 3, **changes}  # fmt: skip
    path = folder / "4"
    path.write_text(json.dumps(holder))
    return path


def test_a_dead_process_of_another_machine_is_detected_by_its_counter(tmp_path: Path) -> None:
    foreign(tmp_path)
    lock = RunLock(tmp_path, **FAST)
    start = time.monotonic()
    assert lock.acquire()
    assert 0.3 < time.monotonic() - start < 5
    assert (tmp_path / "5").exists()
    lock.release()


def test_a_living_process_of_another_machine_keeps_its_run(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    code = (
        "import json, sys, time\n"
        "path, n = sys.argv[1], 4\n"
        "while True:\n"
        "    data = json.load(open(path)); data['count'] = n; n += 1\n"
        "    open(path + '.x', 'w').write(json.dumps(data))\n"
        "    import os; os.replace(path + '.x', path); time.sleep(0.05)\n"
    )
    counting = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        time.sleep(0.5)
        assert not RunLock(tmp_path, beat=0.05, patience=5.0).acquire()
    finally:
        counting.kill()
        counting.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_cut_off_lock_does_not_lock_for_ever(tmp_path: Path, content: str) -> None:
    (tmp_path / "1").write_text(content)
    lock = RunLock(tmp_path, **FAST)
    assert lock.acquire()
    lock.release()


def test_a_pid_given_again_is_another_process(tmp_path: Path) -> None:
    me = runlock._this_process()
    foreign(tmp_path, **{**me, "started": "1"})
    lock = RunLock(tmp_path, beat=5.0, patience=60.0)
    assert lock.acquire()
    lock.release()


def test_one_that_stood_still_learns_that_it_lost(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, **FAST)
    assert lock.acquire()
    (tmp_path / "2").write_text(json.dumps({"host": "elsewhere", "count": 0}))
    assert lock.lost.wait(timeout=5)
    lock.release()
    assert json.loads((tmp_path / "2").read_text()) == {"host": "elsewhere", "count": 0}


def test_clocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the wall clock, which may go backwards, nor times of files."""
    lock = RunLock(tmp_path, **FAST)
    assert lock.acquire()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    # As psutil has it, a process started at another time once the wall clock has been set.
    begun = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: begun(self) - 3600)
    monkeypatch.setattr(psutil, "boot_time", lambda: 0.0)
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert not RunLock(tmp_path, **FAST).acquire()
    lock.release()


def contend(folder: str, all_there, won) -> None:
    lock = RunLock(Path(folder), **FAST)
    all_there.wait(60)
    if lock.acquire():
        won.put(os.getpid())
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("left", [False, True], ids=["no lock", "a dead process's lock"])
def test_of_many_one_gets_it(tmp_path: Path, left: bool) -> None:
    if left:
        foreign(tmp_path)
    together = (CONTEXT.Barrier(4), CONTEXT.Queue())
    won = together[1]
    processes = [CONTEXT.Process(target=contend, args=(str(tmp_path), *together)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert not won.empty()
    won.get()
    assert won.empty()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    from mixlora_exp.errors import UserError

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another output_dir"):
        RunLock(tmp_path / "file" / "lock", **FAST).acquire()


def test_one_who_looked_long_ago_does_not_get_a_number_that_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found a dead holder; before it creates its file, others take the lock and give it back."""
    foreign(tmp_path)
    late = RunLock(tmp_path, **FAST)
    real, others = late._create, []

    def create(number: int) -> bool:
        for _ in range(0 if others else 20):
            others.append(RunLock(tmp_path, **FAST))
            assert others[-1].acquire()
            if len(others) < 20:
                others[-1].release()
        return real(number)

    monkeypatch.setattr(late, "_create", create)
    assert not late.acquire()
    assert others[-1].held()
    others[-1].release()


def test_a_hidden_process_is_detected_by_its_counter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a system hides the processes of other users, one that is there may be alive."""
    me = runlock._this_process()
    path = foreign(tmp_path, **{**me, "pid": 2**22 + 7})
    real = runlock._started

    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(runlock, "_started", lambda pid: real(pid) if pid == me["pid"] else None)
    monkeypatch.setattr(os, "kill", refuse)
    assert runlock._dead_here(json.loads(path.read_text())) is None
    lock = RunLock(tmp_path, **FAST)
    begun = time.monotonic()
    assert lock.acquire()
    assert time.monotonic() - begun > 0.3
    lock.release()


def test_a_full_disk_neither_locks_nor_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(tmp_path, beat=0.02, patience=0.4)
    assert lock.acquire()
    real = Path.write_text

    def full(self: Path, text: str) -> int:
        real(self, "")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        time.sleep(0.2)
        lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert holder_of(tmp_path) is None
    again = RunLock(tmp_path, beat=5.0, patience=60.0)
    assert again.acquire()
    assert (tmp_path / "2").exists()
    again.release()


def test_the_holder_looks_itself(tmp_path: Path) -> None:
    """Not only at the next beat."""
    lock = RunLock(tmp_path, beat=60.0, patience=360.0)
    assert lock.acquire()
    assert lock.held()
    (tmp_path / "2").write_text(json.dumps({"host": "elsewhere", "count": 0}))
    assert not lock.held()
    assert lock.lost.is_set()
    lock.release()


def test_a_finished_run_keeps_no_lock(tmp_path: Path) -> None:
    """Nor is anybody refused who waited for it."""
    folder = tmp_path / "lock"
    lock, other = RunLock(folder, **FAST), RunLock(folder, **FAST)
    assert lock.acquire()
    assert not other.acquire()
    lock.discard()
    assert not folder.exists()
    assert holder_of(folder) is None
    assert other.acquire()
    # One that was taken over leaves the new holder's file.
    slow = RunLock(folder, **FAST)
    slow._number = other._number - 1
    slow.discard()
    assert [path.name for path in folder.iterdir()] == [str(other._number)]
    other.discard()
    assert not folder.exists()


def test_a_lock_whose_folder_went_meanwhile_is_taken_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, write, removed = RunLock(tmp_path / "lock", **FAST), RunLock._write_temporary, []

    def late(self: RunLock, number: int, **more: object) -> Path:
        if not removed:
            removed.append(self.folder.rmdir())
        return write(self, number, **more)

    monkeypatch.setattr(RunLock, "_write_temporary", late)
    assert lock.acquire()
    assert removed
    lock.release()


def test_another_process_of_the_same_start_notices_the_takeover_too(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire()
    second.follow(first.number)
    assert second.held()
    (tmp_path / str(first.number + 1)).write_text("{}")
    assert not second.held()
    before = sorted(path.name for path in tmp_path.iterdir())
    second.release()
    second.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    first.release()


def test_the_first_process_tells_the_others_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list] = []
    for is_first in (True, False):
        state = SimpleNamespace(is_main_process=is_first, num_processes=2)

        def broadcast(values: list, is_first: bool = is_first) -> None:
            if is_first:
                told.append(list(values))
            else:
                values[:] = told[0]

        monkeypatch.setattr(ownership, "processes", lambda state=state: state)
        monkeypatch.setattr(ownership, "broadcast_object_list", broadcast)
        with ownership.held(tmp_path) as lock:
            assert lock.held()
            (tmp_path / "lock" / "9").write_text("{}")
            assert not lock.held()
        (tmp_path / "lock" / "9").unlink()
