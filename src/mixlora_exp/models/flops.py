"""Floating-point operations of one token's forward pass, from shapes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mixlora_exp.config.schema import (
    FEED_FORWARD_TARGETS,
    LoraMethodConfig,
    MethodConfig,
    MixLoraMethodConfig,
    ModelConfig,
    PeftMethodConfig,
)
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.models.adapted_modules import adapted_projections
from mixlora_exp.models.mixtures import mixture_parameters, router_size
from mixlora_exp.models.parameters import routers_of
from mixlora_exp.models.skeleton import skeleton_of


class Flops(NamedTuple):
    """Two per multiplied pair of numbers. `base`: all linear layers of the model alone, the output
    projection among them; `adapter`: what the method adds, None for types of PEFT that
    `peft_flops` cannot count."""

    base: int
    adapter: int | None


def count_flops(model: ModelConfig, method: MethodConfig, experts: float | None = None) -> Flops:
    """Return the FLOPs of matrix products per token in the kernels that share the frozen products
    (all but `reference`, `peft` and `shared`). The products of attention are not in it, which grow
    with the number of tokens and are the same for every method; nor are norms of DoRA, computed
    once per optimizer step, nor what PEFT's own types compute once in a pass (`peft_flops`).

    A mixture in linear layers multiplies with all of its experts, MixLoRA with those that a token
    has. experts: how many these are, None for as many as the router allows.

    Raises:
        UserError: `count_parameters` does.
    """
    built = skeleton_of(model)
    linears = [m for m in built.modules() if isinstance(m, nn.Linear)]
    base = 2 * sum(linear.in_features * linear.out_features for linear in linears)
    if isinstance(method, LinearMixtureMethodConfig):
        return Flops(base, 2 * mixture_parameters(built, method).matrices)
    if isinstance(method, PeftMethodConfig):
        # PEFT takes a second to load, and most plans do not need it.
        from mixlora_exp.models.peft_flops import peft_flops

        return Flops(base, peft_flops(built, method))
    if not isinstance(method, LoraMethodConfig):
        return Flops(base, 0)
    routers, multiplied = routers_of(model, method), 0.0
    for name, layer, linear, rank in adapted_projections(built, method):
        multiplying: float = rank
        if isinstance(method, MixLoraMethodConfig) and name in FEED_FORWARD_TARGETS:
            slots = routers[layer].slots if experts is None else experts
            multiplying = slots * method.rank_of_experts
            if name == "down_proj" and method.dora and name in method.targets:
                # Each expert scales its own product.
                multiplied += (slots - 1) * linear.in_features * linear.out_features
            if name == "gate_proj":
                multiplied += router_size(routers[layer], linear.in_features)[1]
        if name in method.targets:
            multiplied += multiplying * (linear.in_features + linear.out_features)
    return Flops(base, round(2 * multiplied))
