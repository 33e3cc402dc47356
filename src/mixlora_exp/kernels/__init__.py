"""Kernels of the MixLoRA block: one contract, several implementations, one dispatcher.

A kernel takes `x` (T, D), a `Routing` and a `FeedForward` and returns (T, D). `reference` is the
definition and the oracle of the others; `exact` applies each frozen weight once per token.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixlora_exp.kernels.dora import dora_norms, squared_row_norms
from mixlora_exp.kernels.exact import mixlora_exact
from mixlora_exp.kernels.reference import mixlora_reference
from mixlora_exp.kernels.routing import route, router_fractions, router_loss
from mixlora_exp.kernels.shapes import Experts, FeedForward, Projection, Routing

__all__ = [
    "KERNELS",
    "Experts",
    "FeedForward",
    "Projection",
    "Routing",
    "dora_norms",
    "resolve_kernel",
    "route",
    "router_fractions",
    "router_loss",
    "squared_row_norms",
]

KERNELS: dict[str, Callable[[Tensor, Routing, FeedForward], Tensor]] = {
    "reference": mixlora_reference,
    "exact": mixlora_exact,
}


def resolve_kernel(name: str) -> str:
    """The implementation that `auto` stands for, or `name` itself if it is one.

    Raises:
        ValueError: no kernel has this name.
    """
    if name == "auto":
        return "exact"
    if name not in KERNELS:
        raise ValueError(f"kernel={name} is unknown: choose from auto, {', '.join(KERNELS)}")
    return name
