"""Experts of a mixture in each linear layer of a model, and their parameters."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixlora_exp.config.schema import MethodConfig, ModelConfig, PeftMethodConfig
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import Mixture, Router, Sizes, make_mixture, make_router
from mixlora_exp.models.adapted_modules import (
    adapted_layers,
    adapted_projections,
    check_modules,
)
from mixlora_exp.models.skeleton import skeleton_of


def check_mixture(model: ModelConfig, method: MethodConfig) -> None:
    """Refuse a mixture in linear layers that does not fit the model; nothing for other methods.

    Raises:
        UserError: it does not.
    """
    if isinstance(method, LinearMixtureMethodConfig):
        mixture_parameters(skeleton_of(model), method)


class MixtureSize(NamedTuple):
    """Numbers of parameters: trained ones of the experts and of the routers; stored fixed ones; and
    of all of them those in matrices, with which every token is multiplied."""

    low_rank: int
    routers: int
    fixed: int
    matrices: int


def mixture_parameters(model: nn.Module, method: LinearMixtureMethodConfig) -> MixtureSize:
    """Parameter counts of a mixture's adapters on a model.

    Raises:
        UserError: a list has no number for each layer, K > E in one, the weights of a projection
            are too small, or mixture or router refuse an option.
    """
    try:
        return _counted(model, method)
    except ValueError as error:
        raise UserError(f"method.{error}") from error


def router_size(router: Router, width: int) -> tuple[int, int]:
    """Return numbers of a router's parameters for rows of `width` elements: of all, and of those in
    matrices, with which every token is multiplied."""
    held = _held(router, width)
    numbers = [(weight.numel(), weight.numel() * (weight.dim() > 1)) for weight in held]
    return sum(n for n, _ in numbers), sum(n for _, n in numbers)


def _held(router: Router, width: int) -> list[Tensor]:
    with torch.device("meta"):
        return list(router.initial(width).values())


def _sizes(method: LinearMixtureMethodConfig, experts: int, linear: nn.Linear) -> Sizes:
    return Sizes(experts, method.rank_of_experts, linear.in_features, linear.out_features)


def _router(
    method: LinearMixtureMethodConfig,
    mixture: Mixture,
    experts: int,
    chosen: int,
    linear: nn.Linear,
) -> Router | None:
    if mixture.router is None:
        return None
    settings = method.router_settings(experts, chosen, linear.in_features)
    return make_router(method.router_name(mixture.router), settings, method.router_options)


def _counted(model: nn.Module, method: LinearMixtureMethodConfig) -> MixtureSize:
    experts = method.experts_by_layer(model.config.num_hidden_layers)
    mixture = make_mixture(method.mixture.value, method.mixture_options)
    method.check_router(mixture.router)
    check_modules(model, method)
    low_rank = routers = fixed = matrices = 0
    for name, layer, linear, _ in adapted_projections(model, method):
        if name not in method.targets:
            continue
        count, chosen = experts[layer]
        sizes = _sizes(method, count, linear)
        shapes = mixture.shapes(sizes)
        low_rank += sum(prod(s) for part, s in shapes.items() if part not in mixture.fixed)
        fixed += sum(prod(shapes[part]) for part in mixture.fixed)
        matrices += sum(map(prod, shapes.values()))
        router = _router(method, mixture, count, chosen, linear)
        if router is None:
            continue
        size, multiplied = router_size(router, linear.in_features)
        matrices += multiplied
        routers, fixed = routers + size * router.trained, fixed + size * (not router.trained)
    return MixtureSize(low_rank, routers, fixed, matrices)


def fixed_parameters(model: ModelConfig, method: MethodConfig) -> int:
    """Return parameters that an adapter stores but does not train."""
    if getattr(method, "lora_fa", False):
        places = adapted_projections(skeleton_of(model), method)
        return sum(p.rank * p.linear.in_features for p in places if p.name in method.targets)
    if isinstance(method, LinearMixtureMethodConfig):
        return mixture_parameters(skeleton_of(model), method).fixed
    if isinstance(method, PeftMethodConfig):
        from mixlora_exp.models.peft_types import peft_size

        return peft_size(skeleton_of(model), method).fixed
    return 0


def kept_by_mixture(model: ModelConfig, method: LinearMixtureMethodConfig, width: int) -> float:
    """Return bytes that the adapters of a layer, on average over the layers that have some, save
    per token for the backward pass, with `width` bytes per number: z before and after its product
    with the router's weights, the dropped input and the mask; in float32 the router's input,
    probabilities and weights."""
    built = skeleton_of(model)
    experts = method.experts_by_layer(built.config.num_hidden_layers)
    mixture, total = make_mixture(method.mixture.value, method.mixture_options), 0
    for name, layer, linear, _ in adapted_projections(built, method):
        if name not in method.targets:
            continue
        count, chosen = experts[layer]
        sizes = _sizes(method, count, linear)
        total += width * mixture.saved_numbers(sizes)
        if method.dropout:
            total += (width + 1) * linear.in_features
        router = _router(method, mixture, count, chosen, linear)
        if router is None:
            continue
        if not router.chooses:
            # Weights without a gradient: z before their product is not needed, they are.
            total += 4 * count - width * sizes.rank * mixture.shapes(sizes)["A"][0]
            continue
        # Probabilities, per slot an index of 8 bytes, and what divides weights by their sum; more
        # in some routers.
        total += 8 * count + 8 * router.slots
        total += 4 * router.slots + 5 if getattr(router, "normalise", False) else 0
        if width == 2 and router.trained:
            # One copy of the input in float32.
            total += 4 * linear.in_features
    return total / len(adapted_layers(built, method))
