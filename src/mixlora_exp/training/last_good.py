"""Saves the last adapter with a finite loss after training diverged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mixlora_exp.config.schema import Config
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.stability import Diverged

Kept = tuple[int, Path]
"""Optimizer step and folder of a saved adapter with a finite loss."""


def keep_last_good(
    error: Diverged,
    trained: Mapping[str, nn.Parameter],
    checkpoints: Checkpoints | None,
    save: Callable[[Path], Any],
    folder: Path,
) -> Kept | None:
    """Save the last adapter with a finite loss to `folder`/last_good: the current weights, or those
    of the newest good checkpoint. None: there is no such adapter, or it is untrained."""
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
    """Return the error message of a diverged run, with the place of the adapter that was saved."""
    saved = ""
    if kept is not None:
        # Its quality is unknown: the loss may have been high long before it was not finite.
        saved = (
            f" The last adapter with a finite loss, from step {kept[0]}, is in {kept[1]} "
            f"(model={config.model.name})."
        )
    elif error.step > 2:
        saved = (
            f" No earlier adapter was saved, because trainer.save_steps={config.trainer.save_steps}"
            " is larger than the number of good steps; set a smaller one."
        )
    return (
        f"trainer.learning_rate={config.trainer.learning_rate}: {error}; nothing was recorded."
        f"{saved} Lower the rate, or see docs/stability.md"
    )
