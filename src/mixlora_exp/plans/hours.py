"""Estimates the GPU hours of a run from parameters and tokens."""

from __future__ import annotations

import math

from mixlora_exp.config.schema import AnswerForm, Config, TrainedMethodConfig
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.plans.plan import CHARACTERS_PER_TOKEN, known_characters
from mixlora_exp.tasks import TASKS

FLOPS_PER_SECOND = 1e14
"""FLOP/s of one GPU in bf16, about a third of an A100's peak: an assumption, not a measurement."""


def _example_tokens(config: Config, task: str, form: AnswerForm) -> float:
    if task not in TASKS:
        return config.data.cutoff_length / 2
    characters = known_characters(config, task, form)
    return min(characters / CHARACTERS_PER_TOKEN + 2, config.data.cutoff_length)


def _rows(task: str, split: str, limit: int | None) -> int:
    size = TASKS[task].sizes[split] if task in TASKS else 1000
    return min(size, limit or size)


def gpu_hours(config: Config) -> float:
    """Estimated hours on one GPU: 2 x parameters FLOP per token and pass, with one forward and one
    backward pass for training (frozen weights need no gradient), and one forward pass per scored
    item and protocol."""
    counted = count_parameters(config.model, config.method)
    size = counted.base + counted.trainable
    tokens = 0.0
    if isinstance(config.method, TrainedMethodConfig):
        rows = {t: _rows(t, "train", config.data.train_limit_of(t)) for t in config.task.train}
        epoch = sum(
            n * _example_tokens(config, task, form)
            for task, n in rows.items()
            for form in config.data.forms
        )
        passes = config.trainer.epochs
        if config.trainer.max_steps is not None:
            examples = sum(rows.values()) * len(config.data.forms)
            steps = math.ceil(examples / config.trainer.batch_size)
            passes = config.trainer.max_steps / max(steps, 1)
        tokens += 2 * passes * epoch
    for task in config.task.evaluate:
        items = _rows(task, "test", config.evaluation.limit)
        passes = len(config.evaluation.protocols)
        tokens += items * passes * _example_tokens(config, task, AnswerForm.label)
    return 2 * size * tokens / FLOPS_PER_SECOND / 3600
