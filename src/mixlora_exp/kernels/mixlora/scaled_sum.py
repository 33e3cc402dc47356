"""DoRA's scale of the filled slots' outputs and their mixture, for the grouped form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.mixlora.expert_segments import sum_by_token

__all__ = ["scaled_sum"]


class _ScaledSum(torch.autograd.Function):
    """`sum_k w_k scale_{e_k} y_k`: DoRA's scale of the filled slots' outputs, and their mixture.

    y: (P, D) by filled slot; experts, weights: (T, K); scale: (E, D). Keeps y alone, where plain
    operations keep three tensors of that size.
    """

    @staticmethod
    def forward(ctx, y, experts, weights, scale):
        ctx.save_for_backward(y, experts, weights, scale)
        filled = weights != 0
        # `index_select`, which copies whole rows: indexing goes element by element.
        scaled = scale.index_select(0, experts[filled]).mul_(y)
        shares = weights[filled].to(y.dtype)
        return sum_by_token(scaled, torch.arange(len(y)), filled.sum(dim=1), shares)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, experts, weights, scale = ctx.saved_tensors
        filled = weights != 0
        chosen, shares = experts[filled], weights[filled].to(y.dtype).unsqueeze(-1)
        scales = scale.index_select(0, chosen)
        dy = dy.index_select(0, filled.nonzero()[:, 0])
        products = dy * y
        dweights = torch.zeros_like(weights)
        dweights[filled] = (products * scales).sum(dim=-1).to(weights.dtype)
        # A product, which adds up in float32.
        spread = y.new_zeros(len(y), len(scale)).scatter_(1, chosen.unsqueeze(-1), shares)
        return dy.mul_(scales).mul_(shares), None, dweights, spread.T @ products


def scaled_sum(y: Tensor, experts: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Compute `sum_k w_k scale_{e_k} y_k` (T, D), differentiable in all but the experts.

    y: (P, D) by filled slot; experts, weights: (T, K); scale: (E, D).
    """
    return _ScaledSum.apply(y, experts, weights, scale)
