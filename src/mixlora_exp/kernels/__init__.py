"""Kernels of the MixLoRA block: one contract, several implementations, one dispatcher.

A kernel takes `x` (T, D), a `Routing` and a `FeedForward` and returns (T, D):

- `reference`: the definition by loops, the oracle of the others;
- `peft`: whole experts, whose projections run as PEFT's stock LoRA and DoRA do;
- `shared`: the paper's Algorithm 1, gate and up once, down per expert;
- `exact`: each frozen weight once per token, little kept for the backward pass;
- `triton`: the same with fused GPU kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import Tensor

from mixlora_exp.kernels.activations import known_activation
from mixlora_exp.kernels.dora import dora_norms, squared_row_norms
from mixlora_exp.kernels.dropout import DropMask, DropoutKey, DropoutStream, draw_mask
from mixlora_exp.kernels.mixlora.exact import mixlora_exact
from mixlora_exp.kernels.mixlora.reference import mixlora_reference
from mixlora_exp.kernels.mixlora.shared import mixlora_shared
from mixlora_exp.kernels.mixlora.stock import mixlora_stock
from mixlora_exp.kernels.precision import working_dtype
from mixlora_exp.kernels.routing import route, route_bfloat16, router_fractions, router_loss
from mixlora_exp.kernels.shapes import Experts, FeedForward, Projection, Routing

__all__ = [
    "KERNELS",
    "DropMask",
    "DropoutKey",
    "DropoutStream",
    "Experts",
    "FeedForward",
    "Projection",
    "Routing",
    "dora_norms",
    "draw_mask",
    "has_triton",
    "known_activation",
    "resolve_kernel",
    "route",
    "route_bfloat16",
    "router_fractions",
    "router_loss",
    "router_of",
    "squared_row_norms",
    "working_dtype",
]


def mixlora_triton(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)` by fused kernels. x: (T, D); returns (T, D)."""
    # Not before it is used: Triton is missing on many machines.
    from mixlora_exp.kernels.triton.block import mixlora_triton as run

    return run(x, routing, block)


def router_of(kernel: str) -> Callable[[Tensor, Tensor, int], Routing]:
    """The function that routes for a kernel: one launch for `triton`, else `route`."""
    if kernel != "triton":
        return route
    from mixlora_exp.kernels.triton.router import route_triton

    return route_triton


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


KERNELS: dict[str, Callable[[Tensor, Routing, FeedForward], Tensor]] = {
    "reference": mixlora_reference,
    "peft": mixlora_stock,
    "shared": mixlora_shared,
    "exact": mixlora_exact,
    "triton": mixlora_triton,
}


def resolve_kernel(name: str, device: str = "cpu") -> str:
    """The implementation that `auto` stands for on a device type, or `name` itself if it is one.

    Raises:
        ValueError: no kernel has this name.
    """
    if name == "auto":
        return "triton" if device == "cuda" and has_triton() else "exact"
    if name not in KERNELS:
        raise ValueError(f"kernel={name} is unknown: choose from auto, {', '.join(KERNELS)}")
    return name
