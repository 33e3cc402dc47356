"""Dropout whose mask is cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["dropout"]

LEVELS = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability `p` and scale the others by `1 / (1 - p)`.

    A CPU draws random numbers one by one, so here four 16-bit numbers are cut from each 64-bit
    draw; `p` is rounded to a multiple of 2^-16 and the scale follows the rounded one. On a GPU
    this is torch's dropout. Both draw from torch's default generator.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu":
        return functional.dropout(x, p)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    count = x.numel()
    # The full range of int64 has no other name: without bounds the sign bit stays zero.
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[:count] >= dropped - LEVELS // 2
    return x * (kept.view(x.shape).to(x.dtype) * (LEVELS / (LEVELS - dropped)))
