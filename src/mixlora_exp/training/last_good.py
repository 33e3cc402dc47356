"""What is left of a training whose numbers broke: the last adapter that is known to be good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mixlora_exp.config.schema import Config
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.stability import Diverged

__all__ = ["Kept", "diverged_message", "keep_last_good"]

Kept = tuple[int, Path]
"""An adapter that is good: after which optimizer step, and where it is."""


def keep_last_good(
    error: Diverged,
    trained: Mapping[str, nn.Parameter],
    checkpoints: Checkpoints | None,
    save: Callable[[Path], Any],
    folder: Path,
) -> Kept | None:
    """Write the last adapter that is known to give numbers to `folder`/last_good: the one of now,
    or the newest good checkpoint's. None: there is none, or it had not been trained yet."""
    step = error.good
    if not error.usable or not all(weight.isfinite().all() for weight in trained.values()):
        found = None if checkpoints is None else checkpoints.fall_back(step)
        if found is None:
            return None
        found.restore_weights(trained)
        step = found.step
    if step < 1:
        return None
    place = folder / "last_good"
    save(place)
    return step, place


def diverged_message(config: Config, error: Diverged, kept: Kept | None) -> str:
    """What to tell of a run that stopped, and of what was kept of it."""
    told = ""
    if kept is not None:
        # Nothing is known of how good it is: a loss may have been bad long before it was none.
        told = (
            f" The last adapter with which the loss was a number, that of step {kept[0]}, is in "
            f"{kept[1]} (model={config.model.name})."
        )
    elif error.step > 2:
        told = (
            f" No adapter from before is kept: trainer.save_steps={config.trainer.save_steps} "
            "wrote none; a smaller one does."
        )
    return (
        f"trainer.learning_rate={config.trainer.learning_rate}: {error}; nothing was recorded."
        f"{told} Lower the rate, or see docs/stability.md"
    )
