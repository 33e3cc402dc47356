"""Estimates the tokens that a run computes, and from them its GPU hours."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mixlora_exp.config.schema import AnswerForm, Config, TrainedMethodConfig
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.plans.plan import RunPlan, known_tokens
from mixlora_exp.tasks import TASKS

FLOPS_PER_SECOND = 1e14
"""FLOP/s of one GPU in bf16, about a third of an A100's peak: an assumption, not a measurement."""


def _example_tokens(config: Config, task: str, form: AnswerForm) -> float:
    known = task in TASKS
    return known_tokens(config, task, form) if known else config.data.cutoff_length / 2


def _rows(task: str, split: str, limit: int | None) -> int:
    size = TASKS[task].sizes[split] if task in TASKS else 1000
    return min(size, limit or size)


def _epoch_tokens(config: Config) -> float:
    forms = config.data.forms
    rows = {t: _rows(t, "train", config.data.train_limit_of(t)) for t in config.task.train}
    return sum(n * _example_tokens(config, t, form) for t, n in rows.items() for form in forms)


def _scored(config: Config, items: Mapping[str, int]) -> float:
    """Return tokens of the items to score, by task, once for each protocol."""
    passes = len(config.evaluation.protocols) * (1 + config.evaluation.before_training)
    return passes * sum(
        n * _example_tokens(config, task, AnswerForm.label) for task, n in items.items()
    )


def trained_tokens(config: Config, found: RunPlan) -> float:
    """Return positions that training computes, padding included, in all epochs or steps."""
    if not found.examples:
        return 0.0
    epoch = found.tokens / (1 - (found.padding or 0.0))
    return epoch * found.steps / math.ceil(found.examples / config.trainer.batch_size)


def scored_tokens(config: Config, found: RunPlan) -> float:
    """Return tokens that scoring computes, of all protocols."""
    return _scored(config, found.test_rows)


def gpu_hours(config: Config) -> float:
    """Estimated hours on one GPU: 2 x parameters FLOP per token and pass, with one forward and one
    backward pass for training (frozen weights need no gradient), and one forward pass per scored
    item and protocol."""
    counted = count_parameters(config.model, config.method)
    tokens = 0.0
    if isinstance(config.method, TrainedMethodConfig):
        passes = config.trainer.epochs
        if config.trainer.max_steps is not None:
            rows = [_rows(t, "train", config.data.train_limit_of(t)) for t in config.task.train]
            steps = math.ceil(sum(rows) * len(config.data.forms) / config.trainer.batch_size)
            passes = config.trainer.max_steps / max(steps, 1)
        tokens += 2 * passes * _epoch_tokens(config)
    tests = {task: _rows(task, "test", config.evaluation.limit) for task in config.task.evaluate}
    tokens += _scored(config, tests)
    return 2 * (counted.base + counted.trainable) * tokens / FLOPS_PER_SECOND / 3600
