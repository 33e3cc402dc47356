"""What training shows and keeps while it runs: a bar or lines, and a log file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from mixlora_exp.errors import UserError
from mixlora_exp.interruption import requested
from mixlora_exp.runtime import peak_memory_bytes
from mixlora_exp.training.tracking import Tracking

__all__ = [
    "LogFile",
    "ProgressBar",
    "ProgressLines",
    "SendLogs",
    "StopWhenAsked",
    "Watch",
    "append_log",
    "progress_callback",
    "restart_log",
]


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """Append one entry to a JSON-lines file.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    # A loss that is no number has no place in JSON.
    sound = {
        name: None if isinstance(value, float) and not isfinite(value) else value
        for name, value in entry.items()
    }
    try:
        with path.open("a") as file:
            file.write(json.dumps(sound) + "\n")
    except OSError as error:
        raise UserError(
            f"output_dir: cannot write {path} ({error.strerror}); nothing was "
            "recorded. Free space there or choose another output_dir."
        ) from error


class SendLogs(TrainerCallback):
    """Hands every log entry, with speed and memory, to a tracker."""

    def __init__(
        self, tracking: Tracking, tokens: Callable[[], int], expert_load: Callable[[], Any]
    ) -> None:
        self.tracking, self.tokens, self.expert_load = tracking, tokens, expert_load
        self._before = (time.perf_counter(), 0)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._before = (time.perf_counter(), self.tokens())

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        then, tokens = self._before
        self._before = (time.perf_counter(), self.tokens())
        entry = {
            **logs,
            "tokens_per_second": (self._before[1] - tokens) / max(self._before[0] - then, 1e-9),
            "memory_gib": peak_memory_bytes(args.device) / 2**30,
        }
        load = self.expert_load()
        if load is not None:
            entry["expert_load"] = load
        self.tracking.log(state.global_step, entry)


class Watch(TrainerCallback):
    """Tells a function the step and the loss of every log entry as it is made, without the share
    of the router loss (`coefficient`); what it raises ends the training."""

    def __init__(self, watch: Callable[[int, float], None], coefficient: float = 0.0) -> None:
        self.watch, self.coefficient = watch, coefficient

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            share = self.coefficient * logs.get("router_loss", 0.0)
            self.watch(state.global_step, logs["loss"] - share)


class StopWhenAsked(TrainerCallback):
    """Saves and stops after the step in which the process was asked to end."""

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if requested():
            control.should_save = args.save_strategy != SaveStrategy.NO
            control.should_training_stop = True


def restart_log(path: Path, step: int) -> None:
    """Cut a log to the entries up to `step`: what came after is going to be done again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break  # Cut off by a kill.
        kept.append(line + "\n")
    path.write_text("".join(kept)) if kept else path.unlink()


class ProgressBar(ProgressCallback):
    """transformers' bar, with the last losses beside it instead of a printed dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "router_loss") if name in logs}
            self.training_bar.set_postfix(shown)


class ProgressLines(TrainerCallback):
    """A line per logged step, for where there is no terminal to draw a bar on."""

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            shown = f"loss {logs['loss']:.3f}"
            if "router_loss" in logs:
                shown += f" with its share of router loss {logs['router_loss']:.3f}"
            sys.stderr.write(f"  step {state.global_step}/{state.max_steps}, {shown}\n")


def progress_callback() -> TrainerCallback:
    """A bar on a terminal, lines elsewhere."""
    return ProgressBar() if sys.stderr.isatty() else ProgressLines()


class LogFile(TrainerCallback):
    """Appends every log entry, with the expert load per layer, to a JSON-lines file, so that a
    killed run leaves its curve."""

    def __init__(self, path: Path, expert_load: Callable[[], list[list[float]] | None]) -> None:
        self.path = path
        self.expert_load = expert_load

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            restart_log(self.path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        # The last entry tells of the whole: how long it took, which the record has too.
        if state.is_world_process_zero and "loss" in (logs or {}):
            entry = dict(logs)
            load = self.expert_load() if "loss" in logs else None
            if load is not None:
                entry["expert_load"] = load
            append_log(self.path, {"step": state.global_step, **entry})
