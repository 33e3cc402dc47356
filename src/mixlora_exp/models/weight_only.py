"""A quantised linear layer whose product is that of its dequantised weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixlora_exp.kernels import QuantizedLinear, working_dtype


class WeightOnly(nn.Linear):
    """A layer that multiplies `x` as it is with the dequantised weight, as kernels do.

    bitsandbytes' own int8 layer rounds `x` to int8 too, its NF4 layer lays out its weight in
    another way when it is first used on some CPUs, and torchao's rounds the product otherwise.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x W^T + b` (..., out) with W dequantised, in the dtype of autocast or x."""
        dtype = working_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            y = QuantizedLinear(self, dtype).linear(x.to(dtype))
            return y if self.bias is None else y + self.bias.to(dtype)
