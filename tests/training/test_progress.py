"""What a person sees of a training run: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm
from transformers import TrainerState

from mixlora_exp.cli.train import execute
from mixlora_exp.runs.scoring_progress import ScoringProgress
from mixlora_exp.system.console import echo, labelled
from mixlora_exp.training.progress import (
    BAR,
    Pace,
    ProgressBar,
    ProgressLines,
    live_line,
    progress_callback,
)

ROOT = Path(__file__).parents[2]


def _shown(arguments: list[str], *, terminal: bool) -> str:
    """Standard error of `train.py`, which is a terminal or a pipe."""
    command = [sys.executable, "-W", "ignore", "train.py", *arguments]
    if not terminal:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    ours, theirs = pty.openpty()
    # A new terminal has no width, and a bar of no width shows nothing.
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs
    ):
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 2**16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            parts.append(part)
    os.close(ours)
    return b"".join(parts).decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_progress_of_a_run(terminal: bool, tmp_path: Path) -> None:
    shown = _shown(["experiment=smoke", f"output_dir={tmp_path}"], terminal=terminal)
    bar = "2/2" in shown and "100%" in shown and "loss=" in shown
    lines = "step 2/2, loss" in shown
    assert (bar, lines) == (terminal, not terminal), shown
    if terminal:
        assert re.search(r"tokens/s=[\d,]+, router loss=\d", shown)
    else:
        assert re.search(
            r"tokens/s, 0 s left, router loss \d\.\d+ \(x 0\.001 in the loss\)\n", shown
        )


class Shown:
    """Standard error that is not a terminal, or is one."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.lines = terminal, []

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.lines.append(text)


def tell(callback: ProgressLines, job: SimpleNamespace) -> None:
    """What a Trainer tells that logs every step."""
    state = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    for step in range(1, job.steps + 1):
        job.step = step
        callback.on_log(None, state, None, logs={"loss": 1.0})


@pytest.mark.parametrize(("steps", "lines"), [(4, 4), (10, 10), (1000, 11), (4234, 11)])
def test_about_ten_lines_however_long_the_run(steps: int, lines: int, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Shown(False))
    track = SimpleNamespace(tokens=0)
    job = SimpleNamespace(step=0, steps=steps, track=track)
    tell(progress_callback(job), job)
    assert len(shown.lines) == lines
    assert shown.lines[0].startswith(f"  step 1/{steps}, loss 1.000, ")
    assert shown.lines[-1].startswith(f"  step {steps}/{steps}, ")


def test_the_time_left_does_not_count_steps_of_an_earlier_start(monkeypatch) -> None:
    """After step 900 of 1000, ten steps in ten seconds: ninety are left, each of a second."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace = Pace(lambda: round(7 * now[0]))
    pace.begin(900)
    now[0] = 10.0
    assert pace.left(910, 1000) == 90
    assert pace.look() == 7


@pytest.mark.slow
def test_several_adapters_tell_about_ten_lines_each(tmp_path: Path, capsys) -> None:
    argv = ["experiment=smoke", "data.train_limit=8", "trainer.batch_size=4", "trainer.epochs=60",
            "trainer.max_steps=20", "trainer.logging_steps=1", "evaluation.limit=1",
            "trainer.micro_batch_size=4", "adapters=[mixlora,lora]"]  # fmt: skip
    assert execute([*argv, f"output_dir={tmp_path}"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if " step " in line]
    for method in ("mixlora", "lora"):
        own = [line for line in told if f"-{method}-" in line]
        assert len(own) == 11
        assert re.search(r"step 20/20, loss \d.*, [\d,]+ tokens/s, 0 s left", own[-1])


def test_a_bar_of_80_columns_keeps_what_one_waits_for() -> None:
    stream = io.StringIO()
    bar = tqdm(total=12345, ncols=80, file=stream, bar_format=BAR, mininterval=0)
    bar.set_postfix({"loss": "1.234", "tokens/s": "12,345", "router loss": "1.023"})
    bar.update(678)
    bar.refresh()
    line = stream.getvalue().split("\r")[-1]
    assert len(line) <= 80
    for shown in ("678/12345", " left", "loss=1.234", "tokens/s=12,345"):
        assert shown in line


def test_the_router_loss_says_how_much_of_it_counts() -> None:
    line = live_line(3, 9, {"loss": 2.5, "router_loss": 1.023}, 1234.0, 60.0, 0.001)
    assert line == (
        "step 3/9, loss 2.500, 1,234 tokens/s, 60 s left, router loss 1.023 (x 0.001 in the loss)"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_scoring_shows_how_far_it_is(terminal: bool, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    shown = Shown(terminal)
    shown.flush = lambda: None
    monkeypatch.setattr(sys, "stderr", shown)
    watch = ScoringProgress("answer_text")
    for done in range(100, 1001, 100):
        now[0] += 10.0
        watch(done, 1000)
    if terminal:
        assert shown.lines[0] == "\r  answer_text: 100 of 1,000 items, 90 s left"
        assert len(shown.lines) == 10
        assert shown.lines[-1].strip() == "", "the scores take its place"
    else:
        assert shown.lines == [
            f"  answer_text: {done} of 1,000 items, {left} s left\n"
            for done, left in ((300, 70), (600, 40), (900, 10))
        ]


def test_lines_of_several_processes_are_told_apart(monkeypatch, capsys) -> None:
    """A bar would be written over by the others."""
    monkeypatch.setattr(sys, "stderr", shown := Shown(True))
    job = SimpleNamespace(step=0, steps=4, track=SimpleNamespace(tokens=0))
    assert isinstance(progress_callback(job), ProgressBar)
    with labelled("run 3"):
        tell(progress_callback(job), job)
        echo("Training lora on 8 examples")
    assert all(line.startswith("  run 3: step ") for line in shown.lines)
    assert capsys.readouterr().out == "run 3: Training lora on 8 examples\n"
    echo("Scoring")
    assert capsys.readouterr().out == "Scoring\n"
