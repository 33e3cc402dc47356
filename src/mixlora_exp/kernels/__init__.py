"""Kernels of the MixLoRA block: one contract, several implementations, one dispatcher.

A kernel takes `x` (T, D), a `Routing` and a `FeedForward` and returns (T, D):

- `reference`: the definition by loops, the oracle of the others;
- `peft`: whole experts, whose projections run as PEFT's stock LoRA and DoRA do;
- `shared`: the paper's Algorithm 1, gate and up once, down per expert;
- `exact`: each frozen weight once per token, little kept for the backward pass;
- `triton`: the same with fused GPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixlora_exp.kernels.activations import known_activation
from mixlora_exp.kernels.dora import dora_norms, squared_row_norms
from mixlora_exp.kernels.dropout import DropMask, draw_mask
from mixlora_exp.kernels.exact import mixlora_exact
from mixlora_exp.kernels.precision import working_dtype
from mixlora_exp.kernels.reference import mixlora_reference
from mixlora_exp.kernels.routing import route, router_fractions, router_loss
from mixlora_exp.kernels.shapes import Experts, FeedForward, Projection, Routing
from mixlora_exp.kernels.shared import mixlora_shared
from mixlora_exp.kernels.stock import mixlora_stock

__all__ = [
    "KERNELS",
    "DropMask",
    "Experts",
    "FeedForward",
    "Projection",
    "Routing",
    "dora_norms",
    "draw_mask",
    "known_activation",
    "resolve_kernel",
    "route",
    "router_fractions",
    "router_loss",
    "squared_row_norms",
    "working_dtype",
]

KERNELS: dict[str, Callable[[Tensor, Routing, FeedForward], Tensor]] = {
    "reference": mixlora_reference,
    "peft": mixlora_stock,
    "shared": mixlora_shared,
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
