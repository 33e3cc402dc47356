"""The optimizer, its parameter groups (learning rates and weight decay by kind of parameter), and
the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments, get_scheduler

from mixlora_exp.adapters.mixed_adapters import parameters_of
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
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


def optimizer_of(
    args: TrainingArguments, groups: list[dict[str, Any]], names: Mapping[int, str], optim: str
) -> Optimizer:
    """Return the optimizer `trainer.optim` with these parameter groups. args: the Trainer's, which
    have transformers' name of it. names: of parameters, by `id`.

    Raises:
        UserError: muon gets a parameter that is no matrix.
    """
    if optim == "muon":
        for parameter in (one for group in groups for one in group["params"]):
            if parameter.dim() != 2:
                raise UserError(
                    f"trainer.optim=muon updates matrices alone, and {names[id(parameter)]} has "
                    f"{parameter.dim()} dimensions: use it with LoRA, or choose another optimizer"
                )
        kept = [{k: v for k, v in group.items() if k != "betas"} for group in groups]
        return torch.optim.Muon(kept)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return kind(groups, **options)


def schedule_of(config: Config, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the completed optimizer steps.

    Raises:
        UserError: transformers refuses an option.
    """
    trainer = config.trainer
    # transformers makes a schedule for an optimizer as a whole, of which only the factor is taken;
    # some of them compare an end with its rate.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=trainer.learning_rate)
    name = trainer.schedule
    if name == "constant" and trainer.warmup_steps:
        # "constant" ignores warm-up steps.
        name = "constant_with_warmup"
    options = dict(trainer.schedule_options)
    try:
        made = get_scheduler(name, stand_in, trainer.warmup_steps, steps, options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"trainer.schedule={name} with trainer.schedule_options={options}: {error}"
        ) from error
    factor = made.lr_lambdas[0]
    if not trainer.final_rate:
        return factor

    def floored(step: int) -> float:
        rising = step < trainer.warmup_steps
        return (
            factor(step) if rising else trainer.final_rate + (1 - trainer.final_rate) * factor(step)
        )

    return floored
