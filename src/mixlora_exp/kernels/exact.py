"""MixLoRA with each frozen weight applied once per token (exact, not an approximation).

The down projection is linear and shared by all experts, so

    sum_k w_k (W2 h_k + s B2_k A2_k h_k)  =  W2 (sum_k w_k h_k)  +  s sum_k w_k B2_k A2_k h_k

and W1, W3 and W2 run once per token whatever K is. The low-rank parts are dense products over the
experts stacked to `E R` columns, of which a slot keeps those of its expert: no sorting, no loop
over experts and no shape that depends on the data. With DoRA the row scale of an expert stands
before the sum, so W2 runs on K hidden states; gate and up still run once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.dropout import dropout
from mixlora_exp.kernels.shapes import Experts, FeedForward, Projection, Routing

__all__ = ["mixlora_exact"]


def _keep_chosen(columns: Tensor, chosen: Tensor, num_experts: int) -> Tensor:
    """Zero all but the columns of each slot's expert.

    columns: (T, K or 1, E R); chosen: (T, K, E) bool; returns (T, K, E R).
    """
    grouped = columns.unflatten(-1, (num_experts, -1))
    return torch.where(chosen.unsqueeze(-1), grouped, 0.0).flatten(-2)


def _expand(low: Tensor, experts: Experts) -> Tensor:
    """`s B_all low`: (..., E R) to (..., out)."""
    b = experts.b.transpose(1, 2).flatten(0, 1).to(low.dtype)
    return (low * experts.scaling) @ b


def _reduce(x: Tensor, experts: Experts) -> Tensor:
    """`A_all x`: (..., in) to (..., E R)."""
    return functional.linear(x, experts.a.flatten(0, 1).to(x.dtype))


def _scale(experts: Experts, routing: Routing) -> Tensor:
    """`m_e / ||W + s B_e A_e||` of each slot's expert, (T, K, out)."""
    assert experts.magnitude is not None
    assert experts.norm is not None
    return functional.embedding(routing.experts, experts.magnitude / experts.norm)


def _slots(x: Tensor, x_low: Tensor, projection: Projection, routing: Routing, chosen: Tensor):
    """What each slot's expert makes of its token: (T, K, out), or (T, 1, out) without experts."""
    y = functional.linear(x, projection.weight).unsqueeze(1)
    experts = projection.experts
    if experts is None:
        return y
    low = _reduce(x_low, experts).unsqueeze(1)
    y = y + _expand(_keep_chosen(low, chosen, chosen.shape[-1]), experts)
    return y if experts.magnitude is None else y * _scale(experts, routing).to(y.dtype)


def mixlora_exact(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D)."""
    num_experts = routing.probabilities.shape[-1]
    chosen = functional.one_hot(routing.experts, num_experts).bool()
    weights = routing.weights.to(x.dtype).unsqueeze(-1)
    x_low = dropout(x, block.dropout)
    hidden = block.activation(_slots(x, x_low, block.gate, routing, chosen))
    hidden = hidden * _slots(x, x_low, block.up, routing, chosen)
    experts = block.down.experts
    low = None
    if experts is not None:
        low = _keep_chosen(_reduce(dropout(hidden, block.dropout), experts), chosen, num_experts)
    if experts is not None and experts.magnitude is not None:
        y = functional.linear(hidden, block.down.weight) + _expand(low, experts)
        return (weights * y * _scale(experts, routing).to(y.dtype)).sum(dim=1)
    y = functional.linear((weights * hidden).sum(dim=1), block.down.weight)
    return y if low is None else y + _expand((weights * low).sum(dim=1), experts)
