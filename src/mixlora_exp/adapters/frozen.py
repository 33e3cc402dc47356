"""The base model's own projections as the kernels take them."""

from __future__ import annotations

import torch
from torch import nn

from mixlora_exp.kernels import Frozen, FrozenLinear, QuantizedLinear, is_quantized

__all__ = ["frozen_linear", "is_linear", "refuse_merge"]


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is an `nn.Linear` itself, quantised or not: other subclasses may not
    hold their weight as a matrix."""
    return type(layer) is nn.Linear or (isinstance(layer, nn.Linear) and is_quantized(layer))


def frozen_linear(base: nn.Linear, dtype: torch.dtype, *, biased: bool = False) -> Frozen:
    """Return the weight of a projection of the base model, its products in `dtype`; the bias too,
    if so asked."""
    bias = base.bias.to(dtype) if biased and base.bias is not None else None
    if is_quantized(base):
        return QuantizedLinear(base, dtype, bias)
    return FrozenLinear(base.weight.to(dtype), bias)


def refuse_merge(base: nn.Module) -> None:
    """Raise a ValueError for a quantised layer: rounded to its few values again, most of an
    adapter's small changes would be lost."""
    if is_quantized(base):
        raise ValueError(
            "an adapter cannot be merged into a quantised base: load the base without quantization"
        )
