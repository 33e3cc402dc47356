"""The dtype that a kernel computes in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["working_dtype"]


def working_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on (float64 stays), else the dtype of `x`.

    Kernels run with autocast off: their functions hold products that it would not reach, and cast
    what they need themselves.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
