"""The optimizer's parameter groups: learning rates and weight decay by kind of parameter, and the
learning rate's schedule."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import get_scheduler

from mixlora_exp.adapters.mixed_adapters import parameters_of
from mixlora_exp.config.schema import Config
from mixlora_exp.models.parameter_roles import rate_factor
from mixlora_exp.training.job import Job


def parameter_groups(model: nn.Module, job: Job, decayed: Collection[str]) -> list[dict[str, Any]]:
    """Return the groups of one job's parameters; `adapter` in a group is the job's name. decayed:
    names in the model of parameters with weight decay.

    Raises:
        UserError: with LoRA+, a parameter has no role.
    """
    method, trainer = job.config.method, job.config.trainer
    names = {id(p): name for name, p in parameters_of(model, job.name).items()}
    alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in job.parameters.items():
        factor = rate_factor(name, method.lora_plus_ratio)
        alike.setdefault((factor, names[id(parameter)] in decayed), []).append(parameter)
    return [
        {
            "params": own,
            "lr": factor * trainer.learning_rate,
            "weight_decay": trainer.weight_decay if decay else 0.0,
            "betas": tuple(trainer.betas),
            "adapter": job.name,
        }
        for (factor, decay), own in alike.items()
    ]


def schedule_of(config: Config, steps: int, optimizer: Optimizer) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the completed optimizer steps.
    `optimizer`: whose groups have their `initial_lr`; transformers makes a schedule for one as a
    whole, of which only the factor is taken."""
    trainer = config.trainer
    name = trainer.schedule
    if name == "constant" and trainer.warmup_steps:
        # "constant" ignores warm-up steps.
        name = "constant_with_warmup"
    factor = get_scheduler(name, optimizer, trainer.warmup_steps, steps).lr_lambdas[0]
    if not trainer.final_rate:
        return factor

    def floored(step: int) -> float:
        rising = step < trainer.warmup_steps
        return (
            factor(step) if rising else trainer.final_rate + (1 - trainer.final_rate) * factor(step)
        )

    return floored
