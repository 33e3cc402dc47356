"""A second try with smaller micro-batches, where the configured ones do not fit the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mixlora_exp.config.schema import Config, TrainerConfig
from mixlora_exp.system.device import free_memory
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.fit import NotEnoughMemory, TrainSummary

__all__ = ["fit_halving"]


def fit_halving(
    config: Config,
    checkpoints: Checkpoints,
    fit: Callable[[Config], TrainSummary],
    say: Callable[[str], None],
) -> TrainSummary:
    """Train by `fit`, which makes an adapter of its own and takes it off again; with
    `trainer.auto_micro_batch` once more, from the beginning and with micro-batches of half the
    size, if they do not fit. `checkpoints` tell an earlier start's size.

    Raises:
        NotEnoughMemory: the smaller ones do not fit either, or none are to be tried.
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
            say(f"Micro-batches of {size} do not fit; beginning anew with micro-batches of {half}")
        # Out of the error's reach, the first adapter and its optimizer only refer to one another.
        free_memory()
    smaller = dataclasses.replace(config.trainer, micro_batch_size=half)
    summary = fit(dataclasses.replace(config, trainer=smaller))
    return dataclasses.replace(summary, halved_micro_batch=half)


def _half(trainer: TrainerConfig) -> int | None:
    """Half of the configured size, or the next smaller one that divides the batch; None where it is
    not to be halved, or is one example."""
    if not trainer.auto_micro_batch:
        return None
    sizes = range(trainer.micro_batch_size // 2, 0, -1)
    return next((size for size in sizes if trainer.batch_size % size == 0), None)
