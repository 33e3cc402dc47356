"""A sweep as a whole: checked before it starts, counted at its end, whatever its processes do."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import compose

from mixlora_exp.cli.train import execute
from mixlora_exp.config.command import Cell, Plan
from mixlora_exp.sweeps import jobs
from mixlora_exp.sweeps import launch as sweep
from mixlora_exp.sweeps.jobs import SWEEP, Outcome
from mixlora_exp.sweeps.ledger import Ledger
from mixlora_exp.sweeps.summary import (
    Finished,
    best_settings,
    edge_of_grid,
    edge_of_range,
    summary,
)
from mixlora_exp.system import signals as interruption
from mixlora_exp.system.runlock import RunLock
from mixlora_exp.system.signals import Terminated, deferred, heeded, install, requested

SMALL = ["experiment=smoke", "data.train_limit=8", "evaluation.batch_check=0"]
ON_A_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    depth = interruption._STATE.depth
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interruption._STATE.depth = depth
    interruption._STATE.requested.clear()
    SWEEP.runs = 0


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str) -> str:
    """The one line on which a sweep is refused before its first cell starts."""
    assert execute(["-m", *SMALL, f"output_dir={folder}", *argv]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


# Where nothing can be written.


def test_a_file_in_the_way_of_the_output_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        told = refused(capsys, folder, "method=lora,dora")
        assert f"output_dir={folder}" in told
        assert "choose another output_dir" in told


def test_a_read_only_file_system_is_one_line(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def refuse(path: Any, *rest: Any, **more: Any) -> None:
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "Read-only file system" in refused(capsys, tmp_path / "out", "method=lora,dora")


def test_a_read_only_folder_is_one_line(read_only: Path, capsys) -> None:
    assert f"output_dir={read_only}" in refused(capsys, read_only, "method=lora,dora")


# What is checked first.


@pytest.mark.skipif(ON_A_GPU, reason="all kernels run on this machine")
@pytest.mark.parametrize(
    ("sweep_of", "message"),
    [
        ("kernel=exact,triton", "kernel=triton needs a CUDA GPU"),
        ("trainer.head=chunked,liger", "trainer.head=liger needs a CUDA GPU"),
    ],
)
def test_what_this_machine_cannot_compute_is_reported_first(
    sweep_of: str, message: str, tmp_path: Path, capsys
) -> None:
    assert message in refused(capsys, tmp_path, sweep_of)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(ON_A_GPU, reason="all kernels run on this machine")
def test_a_plan_may_be_for_another_machine(tmp_path: Path) -> None:
    argv = ["-m", *SMALL, f"output_dir={tmp_path}", "kernel=exact,triton", "dry_run=true"]
    assert execute(argv) == 0


def test_rows_that_training_leaves_over_are_counted_first(tmp_path: Path, capsys) -> None:
    argv = ["evaluation.held_out=true", "data.train_limit=8,1000000"]
    assert "leaves no row of arc_e to score" in refused(capsys, tmp_path, *argv)


def test_local_files_are_those_in_data(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["experiment=table8_rank", "data=local"]).data.path == "data"
    told = refused(capsys, tmp_path, "data=local", "task=boolq", "method=lora,dora")
    assert "data.path=data does not exist: give one that holds TASK/" in told
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    for split in ("train", "test"):
        row = '{"question": "is it so", "passage": "It is.", "answer": true}\n'
        (tmp_path / "data" / "boolq" / f"{split}.jsonl").write_text(row)
    argv = ["data=local", "task=boolq", "method=lora,dora", "dry_run=true"]
    assert execute(["-m", *SMALL, *argv]) == 0


# What is told at the end.


@pytest.mark.slow
def test_the_end_counts_what_is_done_failed_and_left_alone(tmp_path: Path, capsys) -> None:
    argv = ["-m", *SMALL, f"output_dir={tmp_path}", "trainer.max_steps=1"]
    assert execute([*argv, "method=lora,dora"]) == 0
    told = "== 2 runs: 2 run now, 0 finished before, 0 failed, 0 skipped, "
    assert told in capsys.readouterr().err
    (folder,) = (path.parent for path in tmp_path.glob("*-dora-*/record.json"))
    (folder / "record.json").unlink()
    lock = RunLock(folder / "lock")
    assert lock.acquire()
    with lock:
        assert execute([*argv, "method=lora,dora,mixlora", "seed=42"]) == 0
    seen = capsys.readouterr()
    assert "== 3 runs: 1 run now, 1 finished before, 0 failed, 1 skipped, " in seen.err
    # The results of what was finished are not shown again.
    assert seen.out.count("Already finished: ") == 1
    assert [line for line in seen.out.splitlines() if "Results of" in line] == [
        f"Results of {path.name}" for path in tmp_path.glob("*-mixlora-*")
    ]


def test_a_stopped_sweep_counts_too(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_one(cfg: Any, earlier: Any, recorded: Any, command: Any) -> Outcome:
        if cfg.seed == 2:
            signal.raise_signal(signal.SIGTERM)
        return Outcome(done=1)

    monkeypatch.setattr(jobs, "run_one", run_one)
    assert execute(["-m", *SMALL, f"output_dir={tmp_path}", "seed=1,2,3"]) == 75
    told = capsys.readouterr().err
    assert "== 3 runs: 1 run now, 0 finished before, 0 failed, 0 skipped, 2 stopped" in told
    assert "the same command resumes from there" in told


# A pool of processes of which one is killed. Its stand-in is as Hydra's multirun is with joblib: it
# calls the task for each job, and breaks where a process is killed.


class Pool:
    """`kills`: how often the process of a job is killed; `never`: before any job has begun."""

    def __init__(self, jobs: int, kills: dict[int, int], never: bool = False) -> None:
        self.jobs, self.kills, self.never = jobs, kills, never
        self.ran: list[int] = []

    def __call__(self, task: Any) -> None:
        ledger: Ledger = task.keywords["ledger"]
        if self.never:
            raise BrokenExecutor
        for number in range(self.jobs):
            if ledger.outcome(number) is not None or not ledger.may_begin(number):
                continue
            ledger.begin(number)
            if self.kills.get(number, 0):
                self.kills[number] -= 1
                raise BrokenExecutor
            self.ran.append(number)
            ledger.end(number, Outcome(done=1))


@pytest.fixture
def plan() -> Plan:
    config = compose(SMALL)
    cells = tuple(Cell(overrides=(f"seed={seed}",), config=config) for seed in range(4))
    return Plan(multirun=True, expanded=True, cells=cells, launcher="JoblibLauncher")


def end_of(pool: Pool, plan: Plan) -> int:
    SWEEP.begin(len(plan.jobs))
    sweep._by_processes(pool, plan)
    return sweep._print_summary(plan)


def test_jobs_go_on_when_a_process_is_killed(plan: Plan, capsys) -> None:
    pool = Pool(4, {1: 1})
    assert end_of(pool, plan) == 0
    assert pool.ran == [0, 2, 3, 1], "each once, the one that was killed at the end, alone"
    told = capsys.readouterr().err
    assert "while it was running: seed=1; the others continue" in told
    assert "== 4 runs: 4 run now, 0 finished before, 0 failed" in told


def test_a_job_whose_process_is_killed_twice_has_failed(plan: Plan, capsys) -> None:
    pool = Pool(4, {1: 99, 2: 1})
    assert end_of(pool, plan) == 2
    assert pool.ran == [0, 3, 2]
    told = capsys.readouterr().err
    assert "== 4 runs: 3 run now, 0 finished before, 1 failed" in told
    assert "1 of 4 runs failed:\n  seed=1: its process was killed twice" in told


def test_a_pool_that_never_starts_is_given_up(plan: Plan, capsys) -> None:
    assert end_of(Pool(4, {}, never=True), plan) == 2
    assert "seed=3: no process could be started" in capsys.readouterr().err


# A process that a launcher has started is asked to end.


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a job in this process as one that a launcher has started does; training is a step in
    which a signal arrives."""
    job = SimpleNamespace(job=SimpleNamespace(num=0), overrides=SimpleNamespace(task=["seed=1"]))
    monkeypatch.setattr(jobs, "HydraConfig", SimpleNamespace(get=lambda: job))

    def run(number: int, ledger: Ledger | None = None) -> tuple[Outcome | None, list[str]]:
        saved: list[str] = []

        def run_one(cfg: Any, earlier: Any, recorded: Any, command: Any) -> Outcome:
            with deferred():
                signal.raise_signal(number)
                saved.extend(["checkpoint"] if requested() else [])
            return Outcome(done=1)

        monkeypatch.setattr(jobs, "run_one", run_one)
        try:
            return jobs.run_cell(SimpleNamespace(adapters=[]), ledger), saved
        except SystemExit as error:
            return error.code, saved  # type: ignore[return-value]

    return run


def test_a_worker_saves_and_gives_its_job_back(in_a_job: Callable[..., Any], tmp_path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ledger = Ledger(tmp_path)
    outcome, saved = in_a_job(signal.SIGTERM, ledger)
    assert outcome == Outcome(stopped=True)
    assert saved == ["checkpoint"]
    assert ledger.outcome(0) == outcome
    # Between two jobs it is only noted, and the next one does not begin.
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Terminated), heeded():
        pytest.fail("it began")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_of_submitit_saves_before_it_is_queued_again(
    number: int, in_a_job: Callable[..., Any]
) -> None:
    class Handler:
        """As submitit has it: SIGTERM is passed over, and on SIGUSR2 the process ends at once."""

        def bypass(self, number: int, frame: Any) -> None: ...

        def checkpoint_and_try_requeue(self, number: int, frame: Any) -> None:
            raise SystemExit(f"queued again on {number}")

    signal.signal(signal.SIGTERM, Handler().bypass)
    signal.signal(signal.SIGUSR2, Handler().checkpoint_and_try_requeue)
    outcome, saved = in_a_job(number)
    assert saved == ["checkpoint"]
    assert outcome == f"queued again on {int(signal.SIGUSR2)}"


def test_a_stop_lets_no_further_job_begin(in_a_job: Callable[..., Any], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.stop()
    outcome, saved = in_a_job(signal.SIGTERM, ledger)
    assert outcome == Outcome(stopped=True)
    assert not saved


def test_a_signal_that_is_repeated_is_one_request() -> None:
    install()
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


def test_a_sweep_ends_with_one_table(tmp_path: Path, capsys) -> None:
    argv = ["-m", *SMALL, f"output_dir={tmp_path}", "method=lora", "evaluation.limit=4"]
    assert execute([*argv, "trainer.learning_rate=1e-4,1e-3,2e-3", "trainer.max_steps=1"]) == 0
    out = capsys.readouterr().out
    table = out.partition("== Results of the sweep")[2]
    assert table.startswith(", accuracy in %, sorted by arc_e, label_logits")
    rows = re.findall(r"│ (\d)  trainer.learning_rate=(\S+) +│ +([\d.]+) │ +\d+ s │", table)
    assert sorted(rate for _, rate, _ in rows) == ["0.0001", "0.001", "0.002"]
    scores = [float(score) for *_, score in rows]
    assert scores == sorted(scores, reverse=True)
    folders = re.findall(r"^(\d)  (\S+)$", table, re.M)
    assert [number for number, _ in folders] == ["1", "2", "3"]
    for (_, rate, _), (_, folder) in zip(rows, folders, strict=True):
        assert f"-lr{float(rate):g}-" in folder
        assert (Path(folder) / "record.json").is_file()
    # Each run prints under its own heading.
    for _, folder in folders:
        assert f"\n\nResults of {Path(folder).name}\n" in out


def scored(rate: str, accuracy: float) -> Finished:
    scores = [{"task": "a", "protocol": "p", "accuracy": accuracy}]
    return Finished({"trainer.learning_rate": rate}, {"scores": scores}, Path("out"))


def test_averages_are_of_one_protocol_and_all_its_tasks() -> None:
    """A task that one protocol alone scored has no average of its own."""
    keys = (("a", "p"), ("b", "p"), ("a", "q"))

    def run(*accuracies: float) -> Finished:
        scores = [
            {"task": task, "protocol": protocol, "accuracy": accuracy}
            for (task, protocol), accuracy in zip(keys, accuracies, strict=False)
        ]
        return Finished({}, {"scores": scores}, Path("out"))

    columns = {c.head: c.cells for c in summary([run(0.6, 0.2, 0.9), run(0.5)]).figures}
    assert columns["average\np"] == ["40.0", "-"]
    assert list(columns) == ["a\np", "b\np", "a\nq", "average\np", "time"]


def test_the_two_best_settings_are_compared_with_all_their_seeds() -> None:
    """The best run alone would say rank 4, of seeds that rank 8 and 2 do not have."""

    def run(rank: str, seed: str, accuracy: float) -> Finished:
        scores = [{"task": "a", "protocol": "p", "accuracy": accuracy}]
        varied = {"method.rank": rank, "seed": seed}
        return Finished(varied, {"scores": scores}, Path(f"o u/r{rank}s{seed}"))

    ranks = [run("4", "1", 0.9), run("8", "2", 0.8), run("8", "1", 0.7), run("2", "2", 0.7)]
    runs = [*ranks, run("2", "1", 0.7), run("4", "2", 0.1)]
    assert best_settings(runs) == (
        "Compare the two best settings: mixlora-exp compare "
        "'o u/r8s2' 'o u/r8s1' 'o u/r2s2' 'o u/r2s1'"
    )
    assert best_settings(runs[1:3]) is None, "two seeds of one setting"


def test_a_learning_rate_at_the_edge_of_the_grid_is_reported() -> None:
    low, middle, high = scored("1e-4", 0.5), scored("3e-4", 0.6), scored("1e-3", 0.7)
    assert edge_of_grid([middle, high, low]) is None
    assert "largest learning rate of the sweep (trainer.learning_rate=1e-3): try larger" in str(
        edge_of_grid([high, middle, low])
    )
    assert "try smaller" in str(edge_of_grid([low, middle, high]))
    assert edge_of_grid([high]) is None


def test_a_learning_rate_at_the_end_of_a_search_is_told() -> None:
    """Within a tenth of the range, on a logarithmic scale."""
    assert edge_of_range(3e-4, 1e-5, 1e-3) is None
    assert "(trainer.learning_rate=0.0007 of 1e-05 to 0.001): try larger ones (rate_high)" in str(
        edge_of_range(7e-4, 1e-5, 1e-3)
    )
    assert "lower end" in str(edge_of_range(1.5e-5, 1e-5, 1e-3))
    assert "try smaller ones (rate_low)" in str(edge_of_range(1e-5, 1e-5, 1e-3))
