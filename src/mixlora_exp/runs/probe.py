"""Measures the speed of a run by a few of its steps (`dry_run=true plan.probe=true`)."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.config.schema import Config, TrainedMethodConfig
from mixlora_exp.evaluation import Scorer, score_tests
from mixlora_exp.models.precision import autocast
from mixlora_exp.plans.hours import scored_tokens
from mixlora_exp.plans.plan import plan
from mixlora_exp.plans.speed import Speed
from mixlora_exp.runs.inputs import gather_inputs
from mixlora_exp.runs.state import Run, start, training_examples
from mixlora_exp.system.console import echo
from mixlora_exp.system.device import free_memory, processes
from mixlora_exp.training import TrainSummary, fit, fit_halving

STEPS, ITEMS = 3, 4
"""Steps that are measured, after one in which kernels are compiled, and items to score per task."""


def probed_speed(config: Config) -> Speed:
    """Load the model, train some steps, score some items, and write nothing that stays.

    Raises:
        UserError: as a run with this configuration.
    """
    with tempfile.TemporaryDirectory() as place:
        training, scoring = _speeds(config, place)
    # Nothing refers to the model any more.
    free_memory()
    return Speed(training, scoring, f"a probe of {STEPS} steps and {ITEMS} items a task")


def _speeds(config: Config, place: str) -> tuple[float, float]:
    """Return tokens per second of training and of scoring; writes into the folder `place`."""
    short = _shortened(config, place)
    this = start(short, Path(place) / "probe", gather_inputs(short))
    base, evaluation = this.load_base(), short.evaluation
    seconds = _scoring_seconds(this, base)
    scoring = scored_tokens(short, plan(short)) / (1 + evaluation.before_training) / seconds
    if not isinstance(config.method, TrainedMethodConfig):
        return scoring, scoring
    padding = plan(config).padding or 0.0
    return _training_speed(this, base) / (1 - padding), scoring


def _shortened(config: Config, place: str) -> Config:
    """Return the configuration with few steps and items; AdaLoRA's schedule would need more
    steps."""
    method = config.method
    if getattr(method, "peft_type", None) == "ADALORA":
        method = replace(method, peft={**method.peft, "tinit": 0, "tfinal": 0})
    trainer = replace(config.trainer, max_steps=STEPS + 1, logging_steps=1)
    evaluation = replace(config.evaluation, limit=ITEMS, batch_check=0)
    return replace(config, method=method, trainer=trainer, evaluation=evaluation, output_dir=place)


def _scoring_seconds(this: Run, base) -> float:
    config = this.config
    context = autocast(base.device, this.dtype)
    begun = time.perf_counter()
    for protocol in config.evaluation.protocols:
        scorer = Scorer(base, this.tokenizer, context, config.evaluation.batch_tokens)
        encoded = this.encoded[protocol.value]
        score_tests(protocol, scorer, this.tests, config.data, config.evaluation, encoded)
    return time.perf_counter() - begun


def _training_speed(this: Run, base) -> float:
    """Return tokens per second on this process, without padding."""
    times: list[float] = []
    summary = fit_halving(this.config, this.checkpoints(), partial(_fit, this, base, times), echo)
    spans = [b - a for a, b in zip(times, times[1:], strict=False)]
    seconds = statistics.median(spans) if spans else summary.seconds
    return summary.tokens / summary.steps / seconds / processes().num_processes


def _fit(this: Run, base, times: list[float], config: Config) -> TrainSummary:
    """Train an adapter and remove it from `base`; `times` gets when each step ended."""
    times.clear()
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    try:
        return fit(
            config=config,
            model=model,
            tokenizer=this.tokenizer,
            examples=training_examples(this),
            folder=this.folder,
            dtype=this.dtype,
            watch=lambda step, loss: times.append(time.perf_counter()),
        )
    finally:
        model.unload()
