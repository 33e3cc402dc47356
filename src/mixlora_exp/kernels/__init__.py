"""Kernels of the MixLoRA block and its routers: one contract, several implementations.

A kernel takes `x` (T, D), a `Routing` and a `FeedForward` and returns (T, D); it is a file of
`mixlora/` (docs/extending/kernel.md). A router makes the `Routing`; it is a file of `routers/`
(docs/extending/router.md). A mixture of experts in one linear layer is a file of `mixtures/`.
`KERNELS`, `ROUTERS` and `MIXTURES` have them by name.
"""

from __future__ import annotations

import importlib
import pkgutil

from mixlora_exp.kernels import mixlora, mixtures, routers
from mixlora_exp.kernels.activations import known_activation
from mixlora_exp.kernels.dora import dora_norms, squared_row_norms
from mixlora_exp.kernels.dropout import (
    DropMask,
    DropoutKey,
    DropoutStream,
    HashMask,
    RowIds,
    draw_mask,
)
from mixlora_exp.kernels.frozen import Frozen, FrozenLinear
from mixlora_exp.kernels.mixture_base import MIXTURES, Mixture, Sizes, make_mixture
from mixlora_exp.kernels.precision import working_dtype
from mixlora_exp.kernels.quantized import (
    QuantizedLinear,
    is_quantized,
    matrix_of,
    stored,
)
from mixlora_exp.kernels.registry import KERNELS, Kernel, kernel, resolve_kernel
from mixlora_exp.kernels.router_base import (
    ROUTERS,
    Router,
    make_router,
    router,
    router_fractions,
    router_loss,
)
from mixlora_exp.kernels.shapes import ROLES, Experts, FeedForward, Low, Projection, Routing

# Whatever stands in these folders registers itself.
for _package in (mixlora, mixtures, routers):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)

from mixlora_exp.kernels.routers.top_k import route  # noqa: E402

__all__ = [
    "KERNELS",
    "MIXTURES",
    "ROLES",
    "ROUTERS",
    "DropMask",
    "DropoutKey",
    "DropoutStream",
    "Experts",
    "FeedForward",
    "Frozen",
    "FrozenLinear",
    "HashMask",
    "Kernel",
    "Low",
    "Mixture",
    "Projection",
    "QuantizedLinear",
    "Router",
    "Routing",
    "RowIds",
    "Sizes",
    "dora_norms",
    "draw_mask",
    "is_quantized",
    "kernel",
    "known_activation",
    "make_mixture",
    "make_router",
    "matrix_of",
    "resolve_kernel",
    "route",
    "router",
    "router_fractions",
    "router_loss",
    "squared_row_norms",
    "stored",
    "working_dtype",
]
