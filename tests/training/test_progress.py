"""What a person sees of a training run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_progress_of_a_run(terminal: bool, tmp_path: Path) -> None:
    shown = _shown(["experiment=smoke", f"output_dir={tmp_path}"], terminal=terminal)
    bar = "2/2" in shown and "100%" in shown and "loss=" in shown
    lines = "step 2/2, loss" in shown
    assert (bar, lines) == (terminal, not terminal), shown
