"""Ctrl-C while an adapter is trained."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.system import signals
from mixlora_exp.training.trainer import MixLoraTrainer

WORDS = ["experiment=smoke", "method=lora", "trainer.max_steps=4", "trainer.save_steps=100"]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A process in the foreground: in the background of a shell SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Ctrl-C in the second step, so often."""
    real = MixLoraTrainer.training_step

    def training_step(self: MixLoraTrainer, *args, **kwargs):
        if self.state.global_step == 1 and os.environ.pop("PRESS", None):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "training_step", training_step)
    monkeypatch.setenv("PRESS", "1")


def test_the_first_saves_and_says_where_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*WORDS, f"output_dir={tmp_path}"]
    # Terminal and launcher may both send one.
    press(monkeypatch, 2)
    assert execute(argv) == 130
    *_, saved, last = capsys.readouterr().err.splitlines()
    assert saved.endswith("saved after step 2 of 4; the same command resumes there")
    assert last == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert execute(argv) == 0
    assert "resuming after step 2 of 4" in capsys.readouterr().err


def test_an_optimizer_without_checkpoints_says_that_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    press(monkeypatch, 2)
    assert execute([*WORDS, "trainer.optim=adamw_bnb_8bit", f"output_dir={tmp_path}"]) == 130
    *_, unsaved, last = capsys.readouterr().err.splitlines()
    assert unsaved.endswith(
        "step 2 of 4 is not saved: trainer.optim=adamw_bnb_8bit has no checkpoints; it starts from "
        "the beginning"
    )
    assert last == "interrupted"
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_the_second_ends_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "SAME", 0.0)
    press(monkeypatch, 2)
    assert execute([*WORDS, f"output_dir={tmp_path}"]) == 130
    assert "saved after" not in capsys.readouterr().err
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_a_process_that_ignores_it_still_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    press(monkeypatch, 1)
    assert execute([*WORDS, f"output_dir={tmp_path}"]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
