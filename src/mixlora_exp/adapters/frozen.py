"""The base model's own projections as the kernels take them."""

from __future__ import annotations

import torch
from torch import nn

from mixlora_exp.kernels import Frozen, FrozenLinear

__all__ = ["frozen_linear"]


def frozen_linear(base: nn.Linear, dtype: torch.dtype) -> Frozen:
    """The weight of a projection of the base model, its products in `dtype`; without the bias."""
    return FrozenLinear(base.weight.to(dtype))
