"""The projections of a model that a LoRA method is on, with their layers and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from mixlora_exp.config.by_layer import layer_of
from mixlora_exp.config.schema import LoraMethodConfig
from mixlora_exp.config.schema_modules import is_at
from mixlora_exp.errors import UserError
from mixlora_exp.models.skeleton import placed_projections


class Place(NamedTuple):
    """A projection: last part of its name, number of its layer, module, and rank of a LoRA there
    (of experts it is `rank_of_experts`)."""

    name: str
    layer: int
    linear: nn.Linear
    rank: int


def adapted_projections(model: nn.Module, method: LoraMethodConfig) -> Iterator[Place]:
    """Yield the projections in layers that have an adapter of `method`, its targets and others,
    layer by layer."""
    for path, name, linear in placed_projections(model):
        layer = layer_of(path)
        if method.adapts(layer):
            yield Place(name, layer, linear, method.rank_at(path))


def adapted_layers(model: nn.Module, method: LoraMethodConfig) -> list[int]:
    """Return the numbers of the layers that have an adapter."""
    return [layer for layer in range(model.config.num_hidden_layers) if method.adapts(layer)]


def check_modules(model: nn.Module, method: LoraMethodConfig) -> None:
    """Refuse layers that the model does not have, and entries of a pattern that name no projection
    with an adapter.

    Raises:
        UserError: there are some.
    """
    layers, chosen = model.config.num_hidden_layers, method.layers_to_transform or []
    if beyond := [layer for layer in chosen if layer >= layers]:
        raise UserError(
            f"method.layers_to_transform={chosen}: the model has no layer {beyond[0]}, its layers "
            f"are 0 to {layers - 1}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(method, field).items():
            if not any(_is_adapted(path, key, method) for path, _, _ in placed_projections(model)):
                raise UserError(
                    f"method.{field}.{key}={value} names no projection with an adapter: write the "
                    "end of a module's name, as q_proj or layers.0.self_attn.q_proj"
                )


def _is_adapted(path: str, key: str, method: LoraMethodConfig) -> bool:
    return is_at(key, path) and method.adapts(layer_of(path))
