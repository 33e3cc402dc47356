"""Runs that are killed: nothing is lost, and nothing half-written is taken as done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("SOAK_KILLS", "3"))
STAGES = ("training", "checkpoint", "adapter", "predictions", "record")


@pytest.mark.parametrize("method", ["mixdora"])
def test_killed_at_random_moments(
    start, contents, tmp_path: Path, method: str, record_property
) -> None:
    """In training, while a checkpoint, the adapter, predictions and the record are written, and
    shortly after each: whatever a kill leaves, the run ends as one that was not interrupted."""
    whole = start(f"method={method}", f"output_dir={tmp_path / 'whole'}")
    assert whole.wait() == 0, whole.told()
    expected = contents(tmp_path / "whole")
    touched = Counter(whole.touched())
    assert set(touched) == set(STAGES)
    rng, kills, runs = random.Random(0), [], 1
    argv = [f"method={method}", f"output_dir={tmp_path / 'run1'}"]
    while len(kills) < KILLS:
        stage = STAGES[len(kills) % len(STAGES)]
        # A run that goes on has less before it than a whole one: half of what that changes.
        count = rng.randint(1, max(1, touched[stage] // 2))
        delay = rng.choice((0.0, rng.uniform(0, 0.5)))
        attempt = start(*argv, killed=(stage, count, delay))
        ended = attempt.wait()
        assert ended in (0, -signal.SIGKILL), attempt.told()
        found = contents(tmp_path / f"run{runs}")
        # A record that is there is whole, and what an undisturbed run writes.
        assert found in ({}, expected)
        if ended:
            kills.append(stage)
        if found:
            runs += 1
            argv[1] = f"output_dir={tmp_path / f'run{runs}'}"
            assert runs < 2 * KILLS + 5, f"hardly ever killed: {kills}"
    last = start(*argv)
    assert last.wait() == 0, last.told()
    assert contents(tmp_path / f"run{runs}") == expected
    for stage, count in Counter(kills).items():
        record_property(f"kills in {stage}", count)


def test_sigterm_saves_and_asks_for_a_new_start(start, contents, until, tmp_path: Path) -> None:
    argv = ["method=mixlora", "trainer.save_steps=1000"]
    whole = start(*argv, f"output_dir={tmp_path / 'whole'}")
    run = start(*argv, f"output_dir={tmp_path / 'run'}")
    until(lambda: "step 3/12" in run.told())
    run.kill(signal.SIGTERM)
    assert run.wait() == 75
    assert "the same command resumes from there" in run.told()
    (saved,) = (tmp_path / "run").glob("*/checkpoints/step-*")
    again = start(*argv, f"output_dir={tmp_path / 'run'}")
    assert again.wait() == 0
    assert "step 1/12" not in again.told()
    assert whole.wait() == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert not saved.exists(), "checkpoints are not needed beside a record"


@pytest.mark.slow
def test_several_adapters_are_killed_and_go_on(start, contents, until, tmp_path: Path) -> None:
    argv = ["adapters=[lora,{method:mixdora,trainer.max_steps:7}]"]
    whole = start(*argv, f"output_dir={tmp_path / 'whole'}")
    for number, step in ((signal.SIGKILL, 3), (signal.SIGTERM, 6)):
        run = start(*argv, f"output_dir={tmp_path / 'run'}")
        until(lambda run=run, step=step: f"step {step}/12" in run.told())
        run.kill(number)
        assert run.wait() == (75 if number == signal.SIGTERM else -9)
    run = start(*argv, f"output_dir={tmp_path / 'run'}")
    assert run.wait() == 0, run.told()
    assert whole.wait() == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_two_people_start_the_same_run(start, contents, until, tmp_path: Path) -> None:
    """The first stands still while the second looks: it cannot finish before, however slow the
    machine is, and a process that lives keeps its run."""
    argv = ["method=lora", f"output_dir={tmp_path / 'run'}"]
    first = start(*argv, killed=("training", 1, 0.0, signal.SIGSTOP))
    until(lambda: psutil.Process(first.process.pid).status() == psutil.STATUS_STOPPED)
    second = start(*argv)
    assert second.wait() == 0
    told = second.told().replace("\n", " ")
    assert f"Skipped, another process is running it ({os.uname().nodename}" in told
    assert not contents(tmp_path / "run")
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert len(contents(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_sweep_started_by_several_runs_each_cell_once(start, contents, tmp_path: Path) -> None:
    processes, cells = (8, 16) if KILLS > 5 else (3, 4)
    ranks = ",".join(str(rank) for rank in range(1, cells // 2 + 1))
    argv = ["-m", "method=lora,dora", f"method.rank={ranks}", "trainer.max_steps=2",
            f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    started = [start(*argv) for _ in range(processes)]
    for each in started:
        assert each.wait() == 0, each.told()
    assert len(contents(tmp_path / "run")) == cells
    trained = sum(each.told().count("Training ") for each in started)
    assert trained == cells


@pytest.mark.slow
def test_a_sweep_of_its_own_processes(tmp_path: Path) -> None:
    """The script that does the same with real weights, here with tiny ones."""
    words = ["model=tiny", "data=embedded", "method.rank=2", "trainer.precision=float32",
             "--kills=2", "--least=2", "--most=4"]  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "checks" / "soak_sweep.py"), *words]
    command.append(f"--record={tmp_path / 'record.json'}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["same"]) == 2, done.stderr
    assert all(record["same"].values())
    # On a fast machine it may be through before the second.
    assert record["kills"]
