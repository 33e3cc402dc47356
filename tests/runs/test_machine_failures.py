"""Mishaps in a run: killed, a full disk, numbers that are none. Nothing false is left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.runs import run as experiment

Configure = Callable[..., Config]
Start = Callable[..., Any]


class KilledError(BaseException):
    """Stands for a signal: nothing may catch it."""


@pytest.mark.parametrize("where", ["save_adapter", "load_adapter", "finish_record", "write_json"])
def test_a_killed_run_is_started_anew(
    where: str, run: Start, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: Any, **kwargs: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(experiment, where, kill)
        with pytest.raises(KilledError):
            run("method=lora")
    folder = Path(configure().output_dir)
    assert not list(folder.rglob("record.json"))
    result = run("method=lora")
    assert result.record["status"] == "finished"
    assert result.record["train"]["steps"] == 2


def test_a_forced_run_that_is_killed_leaves_no_old_record(
    run: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("method=lora")

    def kill(*args: Any, **kwargs: Any) -> None:
        raise KilledError

    monkeypatch.setattr(experiment, "save_adapter", kill)
    with pytest.raises(KilledError):
        run("method=lora", "force=true")
    assert not first.path.exists(), "its adapter and log are no longer the record's"


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_when_the_adapter_is_saved(
    run: Start, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in ((os, "replace"), (PeftModel, "save_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(*target, full)
            with pytest.raises(UserError, match=r"output_dir.*(No space|full)"):
                run("method=lora")
        folder = Path(configure().output_dir)
        assert not list(folder.rglob("record.json"))
        assert not list(folder.rglob("adapter*/*"))


@pytest.mark.parametrize("name", ["label_logits.jsonl", "record.json"])
def test_a_full_disk_when_results_are_written(
    name: str, run: Start, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            full()
        original(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell files apart")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="the disk is full; nothing was recorded"):
            run("method=none")
    folder = Path(configure().output_dir)
    assert not list(folder.rglob("record.json"))
    assert not list(folder.rglob("*.tmp"))
    assert run("method=none").record["status"] == "finished"


def test_a_full_disk_when_the_log_is_written(
    run: Start, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "train_log.jsonl":
            full()
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(UserError, match=r"train_log\.jsonl"):
        run("method=lora")
    assert not list(Path(configure().output_dir).rglob("record.json"))


def test_an_output_folder_that_cannot_be_made(run: Start, configure: Configure) -> None:
    Path(configure().output_dir).write_text("a file stands here")
    with pytest.raises(UserError, match="output_dir="):
        run("method=none")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_an_absurd_learning_rate_leaves_no_record(
    steps: int, method: str, run: Start, configure: Configure
) -> None:
    """After one step the loss, taken before it, is still a number; the weights are none."""
    with pytest.raises(UserError, match=r"learning_rate|finite"):
        run(f"method={method}", "trainer.learning_rate=1e30", f"trainer.max_steps={steps}")
    assert not list(Path(configure().output_dir).rglob("record.json"))


def test_a_damaged_record_is_one_error(run: Start) -> None:
    first = run("method=none")
    first.path.write_text(first.path.read_text()[:-40])
    with pytest.raises(UserError, match=r"record\.json"):
        run("method=none")
    again = run("method=none", "force=true")
    assert again.predictions("arc_e/label_logits") == first.predictions("arc_e/label_logits")
