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

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.shapes import FeedForward, Projection, Routing

__all__ = ["Finish", "Stage", "add_down_bias", "run_stage", "with_base"]

Finish = Callable[[Tensor], Tensor]
Stage = Callable[[Tensor, Tensor, Tensor, Routing, FeedForward], tuple[Tensor, Finish]]


def run_stage(stage: Stage, x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """Compute the whole block by a stage. x: (T, D); returns (T, D)."""
    gate, up = block.gate.frozen.linear(x), block.up.frozen.linear(x)
    hidden, finish = stage(x, gate, up, routing, block)
    return finish(block.down.frozen.linear(hidden))


def add_down_bias(y: Tensor, weights: Tensor, block: FeedForward) -> Tensor:
    """Return `y` (T, D) with the down projection's bias, where the experts were mixed before it:

        sum_k w_k (scale_k (W2 h_k + s B2_k A2_k h_k) + bias)  =  ... + (sum_k w_k) bias

    weights: (T, K), which need not sum to 1.
    """
    if block.down.bias is None:
        return y
    return torch.addcmul(y, weights.sum(dim=-1, keepdim=True).to(y.dtype), block.down.bias)


def with_base(y: Tensor, x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """Add to the experts' sum y (T, D), for the rows that the router gives to it, the frozen block
    without experts, times `routing.base`, or the row itself (`Routing.skips`). x: (T, D)."""
    if routing.base is None:
        return y

    def frozen(rows: Tensor) -> Tensor:
        if routing.skips:
            return rows
        gate, up = _project(rows, block.gate), _project(rows, block.up)
        return _project(activate(gate, block.activation) * up, block.down)

    weights = routing.base.to(y.dtype).unsqueeze(-1)
    if torch.compiler.is_compiling():
        # All rows, since no shape may depend on the data.
        return torch.addcmul(y, weights, frozen(x))
    rows = routing.base.detach().nonzero().flatten()
    return y.index_add(0, rows, weights[rows] * frozen(x[rows]))


def _project(x: Tensor, projection: Projection) -> Tensor:
    y = projection.frozen.linear(x)
    return y if projection.bias is None else y + projection.bias
