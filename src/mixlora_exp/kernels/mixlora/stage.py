"""The block in two stages around its down projection: the form of every kernel that shares it.

The frozen products run once over all rows, of several adapters too; a stage is what one adapter
does to its own rows between them. It takes x (T, D), the frozen products gate and up (T, F), the
routing and the block, and returns the rows (N, F) that the down projection takes, and a function
from their products (N, D) to the block's output (T, D). N is T, or a row for each slot where the
down projection runs per slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixlora_exp.kernels.shapes import FeedForward, Routing

__all__ = ["Finish", "Stage", "add_down_bias", "run_stage"]

Finish = Callable[[Tensor], Tensor]
Stage = Callable[[Tensor, Tensor, Tensor, Routing, FeedForward], tuple[Tensor, Finish]]


def run_stage(stage: Stage, x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """The whole block by a stage. x: (T, D); returns (T, D)."""
    gate, up = block.gate.frozen.linear(x), block.up.frozen.linear(x)
    hidden, finish = stage(x, gate, up, routing, block)
    return finish(block.down.frozen.linear(hidden))


def add_down_bias(y: Tensor, weights: Tensor, block: FeedForward) -> Tensor:
    """`y` (T, D) with the down projection's bias, where the experts were mixed before it:

        sum_k w_k (scale_k (W2 h_k + s B2_k A2_k h_k) + bias)  =  ... + (sum_k w_k) bias

    weights: (T, K), which need not sum to 1.
    """
    if block.down.bias is None:
        return y
    return torch.addcmul(y, weights.sum(dim=-1, keepdim=True).to(y.dtype), block.down.bias)
