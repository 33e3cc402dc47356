"""Runs that are killed: nothing is lost, and nothing half-written is taken as done."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("SOAK_KILLS", "5"))


@pytest.mark.parametrize("method", ["mixdora"])
def test_killed_at_random_moments(start, contents, tmp_path: Path, method: str) -> None:
    """Across loading, training, checkpoints, scoring and the record."""
    whole = start(f"method={method}", f"output_dir={tmp_path / 'whole'}")
    begun = time.monotonic()
    assert whole.wait() == 0, whole.told()
    duration = time.monotonic() - begun
    rng = random.Random(0)
    for _ in range(KILLS):
        attempt = start(f"method={method}", f"output_dir={tmp_path / 'run'}")
        attempt.process.join(rng.uniform(0.1, 1.0) * duration)
        if attempt.process.is_alive():
            attempt.kill()
        attempt.wait()
        for path in (tmp_path / "run").glob("*/record.json"):
            # Once a record is there it is whole: killed or not, it says what the other says.
            assert path.parent.name in contents(tmp_path / "whole")
    last = start(f"method={method}", f"output_dir={tmp_path / 'run'}")
    assert last.wait() == 0, last.told()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_sigterm_saves_and_asks_for_a_new_start(start, contents, until, tmp_path: Path) -> None:
    argv = ["method=mixlora", "trainer.save_steps=1000", "trainer.logging_steps=1"]
    whole = start(*argv, f"output_dir={tmp_path / 'whole'}")
    run = start(*argv, f"output_dir={tmp_path / 'run'}")
    until(lambda: "step 3/12" in run.told())
    run.kill(signal.SIGTERM)
    assert run.wait() == 75
    assert "the same command goes on from there" in run.told()
    (saved,) = (tmp_path / "run").glob("*/checkpoints/step-*")
    again = start(*argv, f"output_dir={tmp_path / 'run'}")
    assert again.wait() == 0
    assert "step 1/12" not in again.told()
    assert whole.wait() == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert not saved.exists(), "checkpoints are not needed beside a record"


def test_several_adapters_are_killed_and_go_on(start, contents, until, tmp_path: Path) -> None:
    argv = ["adapters=[lora,{method:mixdora,trainer.max_steps:7}]", "trainer.logging_steps=1"]
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
    argv = ["method=lora", f"output_dir={tmp_path / 'run'}", "trainer.logging_steps=1",
            "trainer.max_steps=100"]  # fmt: skip
    first = start(*argv)
    until(lambda: "step 1/100" in first.told())
    second = start(*argv)
    assert second.wait() == 0
    assert f"Running elsewhere ({os.uname().nodename}" in second.told().replace("\n", " ")
    assert first.wait() == 0
    assert len(contents(tmp_path / "run")) == 1


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
