"""Warnings where a training loop that is not this project's leaves out what a mixture needs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from peft import PeftConfig
from torch import nn

from mixlora_exp.adapters.mixtures.config import MixtureConfig
from mixlora_exp.adapters.mixtures.layer import MixtureLinear

__all__ = ["check_started", "warn_without_types"]


def check_started(
    model: nn.Module, configs: Mapping[str, PeftConfig], active: Sequence[str], started: set[str]
) -> None:
    """Refuse to train an adapter that starts from a gradient and has no start: it would be plain
    LoRA under its method's name. Adapters that have one are added to `started`.

    Raises:
        ValueError: there is one without.
    """
    for adapter in set(active) - started:
        config = configs[adapter]
        if not (isinstance(config, MixtureConfig) and config.make_mixture().starts_from_gradient):
            continue
        layers = [m for m in model.modules() if isinstance(m, MixtureLinear)]
        own = [m for m in layers if adapter in m.mixture and not m.disable_adapters]
        # B0 is zero until then. Read until one is found: on a GPU it waits for the device.
        if any(bool(layer.lora_B0[adapter].any()) for layer in own):
            started.add(adapter)
        elif own:
            raise ValueError(
                f"mixture={config.mixture} of adapter {adapter!r} starts from the gradient of the "
                "loss, which was not taken: this project's trainer takes it, another calls "
                "GradientStart(model, adapter).begin(losses) of "
                "mixlora_exp.training.hooks.lora_ga before its first step; or use "
                "mixture='pissa', which starts from the weight"
            )


def warn_without_types(config: PeftConfig) -> None:
    """Warn that the loss of a mixture which needs the types of tasks is 0, in a batch without
    them, though it has a coefficient."""
    typed = isinstance(config, MixtureConfig) and config.make_mixture().typed_loss
    if typed and config.router_loss_coef:
        warnings.warn(
            f"router_loss_coef={config.router_loss_coef} has no balance loss of {config.mixture} "
            "to multiply: that needs task_types in the batch, a tensor (sequences,) of 0 or 1, "
            "which this project's trainer puts there. router_loss_coef=0 trains without",
            stacklevel=3,
        )
