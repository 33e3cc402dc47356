"""Where progress is sent besides the run's own folder."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import TrainerCallback

from mixlora_exp.config.schema import Config, Tracker

__all__ = ["tracker_callbacks"]


def tracker_callbacks(config: Config, folder: Path) -> list[TrainerCallback]:
    """The Trainer callbacks of the chosen tracker. One that cannot be reached is left out with a
    warning: the run's own files do not depend on it."""
    if config.tracker.name is Tracker.none:
        return []
    if config.tracker.name is Tracker.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))]
    import wandb

    from mixlora_exp.config import to_dict  # Needs Hydra, which benchmarks do without.

    try:
        wandb.init(
            project=config.tracker.project,
            name=folder.name,
            dir=str(folder),
            config=to_dict(config),
            # The next cell of a sweep is a run of its own.
            reinit="finish_previous",
        )
    except Exception as error:  # noqa: BLE001 - a tracker never stops a run, whatever it raises
        sys.stderr.write(f"warning: tracker=wandb is left out: {error}\n")
        return []
    return [WandbCallback()]
