"""Progress output of training: a bar or lines on standard error, and a log file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ProgressCallback, TrainerCallback

from mixlora_exp.errors import UserError
from mixlora_exp.system.console import line_label
from mixlora_exp.system.device import processes
from mixlora_exp.system.untrusted import json_lines
from mixlora_exp.training.job import Job


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """Append one entry to a JSON-lines file.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    # JSON has no NaN or infinity.
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
            "recorded. Free space there, or choose another output_dir."
        ) from error


class Pace:
    """Speed and remaining time of training. `tokens()` returns the tokens so far, of all
    processes."""

    def __init__(self, tokens: Callable[[], int]) -> None:
        self.tokens = tokens
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start measuring; training starts or resumes after `step`."""
        now = time.perf_counter()
        self._from, self._since = step, now
        self._before = (now, self.tokens())

    def look(self) -> float:
        """Return tokens per second since the previous call."""
        (then, tokens), self._before = self._before, (time.perf_counter(), self.tokens())
        return (self._before[1] - tokens) / max(self._before[0] - then, 1e-9)

    def left(self, step: int, steps: int) -> float:
        """Return seconds until `steps` are done, extrapolated from the steps so far."""
        passed = time.perf_counter() - self._since
        return passed / max(step - self._from, 1) * (steps - step)


class Tenths:
    """Selects about ten steps of a run to report: the first of each tenth, and the last."""

    def __init__(self) -> None:
        self._last = -1

    def due(self, step: int, steps: int) -> bool:
        """Return whether to report this step; true once per tenth."""
        tenth = 10 * step // max(steps, 1)
        if tenth <= self._last:
            return False
        self._last = tenth
        return True


def live_line(
    step: int,
    steps: int,
    figures: Mapping[str, float],
    speed: float,
    left: float,
    coefficient: float = 0.0,
) -> str:
    """Return a line with step, loss, tokens per second, remaining time (`left`, in seconds), and
    the router loss, which the loss contains times `coefficient`."""
    shown = f"step {step}/{steps}, loss {figures['loss']:.3f}, {speed:,.0f} tokens/s"
    shown += f", {_duration(left)} left"
    if "router_loss" in figures:
        shown += f", router loss {figures['router_loss']:.3f} (x {coefficient:g} in the loss)"
    return shown


def _coefficient(job: Job) -> float:
    return getattr(job.config.method, "router_loss_coef", 0.0)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class PerAdapter(TrainerCallback):
    """Forwards each log entry to the callbacks of its adapter, and other events to all."""

    def __init__(self, callbacks: Mapping[str, Sequence[TrainerCallback]]) -> None:
        self.callbacks = callbacks

    def _all(self, event: str, *args: Any, **kwargs: Any) -> None:
        for callback in (one for own in self.callbacks.values() for one in own):
            getattr(callback, event)(*args, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Forward the event to every adapter's callbacks."""
        self._all("on_train_begin", args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """Forward the event to every adapter's callbacks."""
        self._all("on_step_end", args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        """Forward the event to every adapter's callbacks."""
        self._all("on_train_end", args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        """Forward the entry, without its `adapter`, to that adapter's callbacks."""
        entry = dict(logs)
        for callback in self.callbacks[entry.pop("adapter")]:
            callback.on_log(args, state, control, logs=dict(entry), **kwargs)


class Watch(TrainerCallback):
    """Calls the job's `watch` with step and loss (without router loss) of every log entry;
    exceptions from it end the training."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        """Call `watch` with the step and the loss without router loss."""
        loss = logs["loss"] - _coefficient(self.job) * logs.get("router_loss", 0.0)
        self.job.watch(self.job.step, loss)


def restart_log(path: Path, step: int) -> None:
    """Truncate a log to the entries up to `step`, since later steps will be repeated.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    if not path.is_file():
        return
    kept = []
    try:
        for _, entry in json_lines(path):
            if entry["step"] > step:
                break
            kept.append(json.dumps(entry) + "\n")
    except (OSError, ValueError, KeyError, TypeError):
        pass  # The last line is incomplete after a kill.
    # Written to another file and renamed, so that a kill here loses nothing.
    shorter = path.with_name(f".{path.name}.tmp")
    try:
        shorter.write_text("".join(kept))
        os.replace(shorter, path)
    except OSError as error:
        raise UserError(
            f"output_dir: cannot write {path} ({error.strerror}). Free space there and start the "
            "same command again to resume."
        ) from error


BAR = "{n_fmt}/{total_fmt} {bar:8} {remaining} left{postfix}"


class ProgressBar(ProgressCallback):
    """transformers' progress bar with step, time left, the last loss, tokens per second and router
    loss instead of printed dictionaries; a narrow terminal cuts it from the right."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.pace = job, Pace(partial(_tokens, job))

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Start the bar at the step from which the run resumes."""
        super().on_train_begin(args, state, control, **kwargs)
        self.pace.begin(self.job.step)
        # Otherwise the bar would count the steps before the resume as done in no time.
        self.current_step = self.job.step
        if self.training_bar is not None:
            # tqdm's own order has the time left and the speed of steps last but one.
            self.training_bar.bar_format = BAR
            self.training_bar.total = self.job.steps
            self.training_bar.initial = self.training_bar.n = self.job.step
            self.training_bar.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        """Show loss, tokens per second and router loss behind the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{self.pace.look():,.0f}"}
            if "router_loss" in logs:
                shown["router loss"] = f"{logs['router_loss']:.3f}"
            self.training_bar.set_postfix(shown)


class ProgressLines(TrainerCallback):
    """Prints about ten lines in total, if there is no terminal for a bar. `label` precedes them."""

    def __init__(self, job: Job, label: str = "") -> None:
        self.job, self.label = job, label
        self.pace, self.tenths = Pace(partial(_tokens, job)), Tenths()

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Start measuring tokens per second."""
        self.pace.begin(self.job.step)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        """Print a line to standard error, in the first entry of each tenth of the run."""
        step, steps = self.job.step, self.job.steps
        if state.is_world_process_zero and self.tenths.due(step, steps):
            left = self.pace.left(step, steps)
            coefficient = _coefficient(self.job) if "router_loss" in logs else 0.0
            line = live_line(step, steps, logs, self.pace.look(), left, coefficient)
            sys.stderr.write(f"  {line_label()}{self.label}{line}\n")


def _tokens(job: Job) -> int:
    # An estimate: every process has about as many.
    return int(job.track.tokens) * processes().num_processes


def progress_callback(job: Job) -> TrainerCallback:
    """Return a bar on a terminal that no other process writes to, otherwise a few lines."""
    alone = sys.stderr.isatty() and not line_label()
    return ProgressBar(job) if alone else ProgressLines(job)


class LogFile(TrainerCallback):
    """Appends every log entry, with the expert load per layer, to the run's `train_log.jsonl`, so
    that a killed run leaves its training curve."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.path = job.folder / "train_log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Truncate the log to the step from which the run resumes.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        if state.is_world_process_zero:
            restart_log(self.path, self.job.step)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        """Append the entry with its step and expert load."""
        if not state.is_world_process_zero:
            return
        entry = {"step": self.job.step, **logs}
        if self.job.expert_load is not None:
            entry["expert_load"] = self.job.expert_load
        append_log(self.path, entry)
