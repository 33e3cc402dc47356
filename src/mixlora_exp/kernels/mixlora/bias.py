"""The down projection's bias, for kernels that mix the experts before that projection.

sum_k w_k (scale_k (W2 h_k + s B2_k A2_k h_k) + bias)  =  ... + (sum_k w_k) bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixlora_exp.kernels.shapes import FeedForward

__all__ = ["add_down_bias"]


def add_down_bias(y: Tensor, weights: Tensor, block: FeedForward) -> Tensor:
    """`y` (T, D) with the bias of the down projection, times the sum of each token's `weights`
    (T, K): what the routing gives need not sum to 1."""
    if block.down.bias is None:
        return y
    return torch.addcmul(y, weights.sum(dim=-1, keepdim=True).to(y.dtype), block.down.bias)
