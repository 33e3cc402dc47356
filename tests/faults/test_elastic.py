"""Runs whose number of processes changes under way end as one process would have ended them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import examples_of, train_in
from same_runs import UNEVEN, check_equal

TURNS = ((2, 0), (1, 2), (4, 4))
"""Processes of each start, and the step in which the last one is asked to end; then 2 finish."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parallel"),
    [("lora", "ddp"), ("dora", "ddp"), ("mixlora", "ddp"), ("mixdora", "ddp"), ("mixlora", "fsdp")],
)
def test_2_then_1_then_4_then_2_processes(
    method: str, parallel: str, tmp_path: Path, record_property
) -> None:
    """Every step's loss to 1e-6 and gradient norm to 3e-6 (float32, dropout on); predictions, data
    order and routing exactly."""
    words = [*UNEVEN, f"method={method}", f"trainer.parallel={parallel}", "trainer.logging_steps=1"]
    alone, notes = tmp_path / "its examples", tmp_path / "examples"
    assert train_in(1, [*words, f"output_dir={tmp_path / 'alone'}"], notes=alone) == [0]
    argv = [*words, f"output_dir={tmp_path / 'mixed'}"]
    for count, step in TURNS:
        # The last process alone is asked to end; all stop after the same step.
        assert train_in(count, argv, stop=step, notes=notes) == [75] * count
        names = [path.name for path in (tmp_path / "mixed").glob("*/checkpoints/*")]
        assert max(names) == f"step-{step + 1:08d}"
    assert train_in(2, argv, notes=notes) == [0, 0]
    check_equal(tmp_path / "mixed", tmp_path / "alone", 2)
    assert examples_of(notes) == examples_of(alone)
    record_property(f"changes of the number of processes of {method} by {parallel}", len(TURNS))


@pytest.mark.slow
def test_four_processes_from_the_start(tmp_path: Path) -> None:
    """Log entries are of four steps, of which an epoch's last has fewer micro-batches."""
    words = [*UNEVEN, "trainer.logging_steps=4"]
    assert train_in(1, [*words, f"output_dir={tmp_path / 'alone'}"]) == [0]
    assert train_in(4, [*words, f"output_dir={tmp_path / 'four'}"]) == [0] * 4
    check_equal(tmp_path / "four", tmp_path / "alone", 4)


@pytest.mark.slow
def test_ctrl_c_of_two_processes_saves_and_they_go_on(tmp_path: Path) -> None:
    argv = [*UNEVEN, f"output_dir={tmp_path / 'run'}"]
    found = train_in(2, argv, stop=1, by=signal.SIGINT, log=tmp_path / "log")
    assert found == [130, 130]
    assert "saved after step 2 of 6; the same command" in (tmp_path / "log.0").read_text()
    assert train_in(2, argv, log=tmp_path / "log") == [0, 0]
    assert "resuming after step 2 of 6" in (tmp_path / "log.0").read_text()


@pytest.mark.slow
def test_two_processes_that_are_stopped_while_they_score_keep_their_batches(tmp_path: Path) -> None:
    words = [*UNEVEN, "evaluation.protocols=[answer_text]", "evaluation.batch_tokens=60"]
    assert train_in(1, [*words, f"output_dir={tmp_path / 'alone'}"]) == [0]
    argv = [*words, f"output_dir={tmp_path / 'run'}"]
    assert train_in(2, argv, scored=2, by=signal.SIGINT) == [130, 130]
    kept = sorted(path.name for path in tmp_path.glob("run/*/checkpoints/scores-*"))
    assert kept == [f"scores-adapter-answer_text-batches-{rank}.jsonl" for rank in range(2)]
    assert all(p.read_text().strip() for p in tmp_path.glob("run/*/checkpoints/scores-*"))
    assert train_in(2, argv) == [0, 0]
    check_equal(tmp_path / "run", tmp_path / "alone", 2)
    assert not list(tmp_path.glob("run/*/checkpoints/scores-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_torchrun_is_asked_to_end_and_goes_on(number: int, tmp_path: Path) -> None:
    """The launcher itself receives SIGTERM, or all receive SIGINT. It ends with 1 whatever its
    processes end with."""
    words = [*UNEVEN, "trainer.max_steps=2000", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               "-m", "mixlora_exp.cli.main", "train", *words]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # In the background of a shell it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    end = time.monotonic() + 200
    while not list(tmp_path.glob("run/*/train_log.jsonl")) and time.monotonic() < end:
        time.sleep(0.5)
    if number == signal.SIGINT:
        os.killpg(started.pid, number)
    else:
        started.terminate()
    error = started.communicate(timeout=100)[1]
    assert "the same command resumes there" in error, error[-3000:]
    assert started.returncode == 1
    (saved,) = tmp_path.glob("run/*/checkpoints/step-*")
    step = int(saved.name.removeprefix("step-"))
    assert train_in(1, words, stop=step, log=tmp_path / "log") == [75]
    assert f"resuming after step {step} of 2000" in (tmp_path / "log.0").read_text()
