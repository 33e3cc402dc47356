"""Checks of a run's optimizer and schedule before weights are loaded."""

from __future__ import annotations

import importlib.util

import torch

from mixlora_exp.config.schema import Config, LoraMethodConfig, TrainedMethodConfig
from mixlora_exp.errors import UserError
from mixlora_exp.plans.plan import planned_steps


def check_optimizer(config: Config, *, here: bool = True) -> None:
    """Refuse an optimizer that is not installed or does not go with the method, and options that
    the schedule does not take. `here`: the run executes on this machine.

    Raises:
        UserError: it is one of these.
    """
    trainer, method = config.trainer, config.method
    if not isinstance(method, TrainedMethodConfig):
        return
    facts, given = trainer.optimizer, f"trainer.optim={trainer.optim}"
    if here and facts.package is not None and importlib.util.find_spec(facts.package) is None:
        raise UserError(
            f"{given} needs the package {facts.package}: run `pip install {facts.package}`, or "
            "leave it out"
        )
    if here and facts.matrices and not hasattr(torch.optim, "Muon"):
        raise UserError(f"{given} needs torch 2.9 or later, this is {torch.__version__}")
    plain = type(method) is LoraMethodConfig and not (method.dora and method.train_magnitude)
    if facts.matrices and not plain:
        raise UserError(
            f"{given} updates matrices alone, and method={method.name} trains other parameters as "
            "well: use it with method=lora, or choose another optimizer"
        )
    stateful = getattr(method, "peft_type", None) == "ADALORA" or method.needs_base_gradient
    if stateful and not facts.resumes:
        raise UserError(
            f"{given} was not tried with method={method.name}, which keeps what it computes beside "
            "the optimizer's state: choose another optimizer"
        )
    if trainer.schedule_options:
        # Late: it loads transformers' Trainer.
        from mixlora_exp.training.parameter_groups import schedule_of

        steps = planned_steps(config)
        schedule_of(config, steps)(steps)
