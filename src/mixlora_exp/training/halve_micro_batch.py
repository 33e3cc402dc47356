"""A second attempt with half the micro-batch size if the configured one does not fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mixlora_exp.config.schema import Config, TrainerConfig
from mixlora_exp.errors import NotEnoughMemory
from mixlora_exp.system.device import free_memory
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.fit import TrainSummary


def fit_halving(
    config: Config,
    checkpoints: Checkpoints,
    fit: Callable[[Config], TrainSummary],
    echo: Callable[[str], None],
) -> TrainSummary:
    """Train with `fit`, which attaches an adapter and removes it again. With
    `trainer.auto_micro_batch`, if memory is insufficient, train again from the beginning with half
    the micro-batch size. If `checkpoints` have the halved size, start with it.

    Raises:
        NotEnoughMemory: the halved size does not fit either, or `trainer.auto_micro_batch` is off.
    """
    half = _half(config.trainer)
    if half is None:
        return fit(config)
    found = checkpoints.newest()
    if found is None or found.state.get("micro_batch_size") != half:
        try:
            return fit(config)
        except NotEnoughMemory:
            size = config.trainer.micro_batch_size
            echo(f"Micro-batches of {size} do not fit; restarting with micro-batches of {half}")
        # Outside `except`, which holds the traceback: only reference cycles keep the first adapter.
        free_memory()
    smaller = dataclasses.replace(config.trainer, micro_batch_size=half)
    summary = fit(dataclasses.replace(config, trainer=smaller))
    return dataclasses.replace(summary, halved_micro_batch=half)


def _half(trainer: TrainerConfig) -> int | None:
    """Return half of the configured size, or the next smaller size that divides the batch; None
    if halving is off or the size is 1."""
    if not trainer.auto_micro_batch:
        return None
    sizes = range(trainer.micro_batch_size // 2, 0, -1)
    return next((size for size in sizes if trainer.batch_size % size == 0), None)
