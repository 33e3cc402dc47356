"""What training shows and keeps while it runs: one bar, and one log line per logged step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ProgressCallback, TrainerCallback

__all__ = ["LogFile", "ProgressBar"]


class ProgressBar(ProgressCallback):
    """transformers' bar, with the last losses beside it instead of a printed dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "router_loss") if name in logs}
            self.training_bar.set_postfix(shown)


class LogFile(TrainerCallback):
    """Appends every log entry, with the expert load per layer, to a JSON-lines file, so that a
    killed run leaves its curve."""

    def __init__(self, path: Path, expert_load: Callable[[], list[list[float]] | None]) -> None:
        self.path = path
        self.expert_load = expert_load

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                load = self.expert_load() if "loss" in logs else None
                entry = logs if load is None else {**logs, "expert_load": load}
                file.write(json.dumps({"step": state.global_step, **entry}) + "\n")
