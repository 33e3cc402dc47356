"""Cross-entropy over a large vocabulary without its logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["linear_cross_entropy"]

CHUNK_ELEMENTS = 2**23
"""Logits at a time: 32 MB in float32."""
IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], labels[start : start + rows]
            counted = target != IGNORED
            target = target.clamp(min=0).unsqueeze(1)
            # In float32 from here on, as transformers has it.
            logits = functional.linear(part, weight).to(total.dtype)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            losses = (log_sum - logits.gather(1, target)).squeeze(1)
            total += torch.where(counted, losses, 0.0).sum()
            if gradient is not None:
                logits.sub_(log_sum).exp_()
                logits.scatter_add_(1, target, logits.new_full((), -1.0).expand(len(part), 1))
                made = logits.to(weight.dtype) @ weight
                gradient[start : start + rows] = torch.where(counted.unsqueeze(1), made, 0.0)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the sum over the rows of `logsumexp(W h) - (W h)[label]`, in float32 or better.

    hidden: (N, D); weight: (vocabulary, D), frozen; labels: (N,), -100 where a row does not count.
    A few rows of logits exist at a time, and their gradient is taken at once, so memory does not
    grow with N x vocabulary.

    Raises:
        ValueError: `weight` asks for a gradient.
    """
    if weight.requires_grad:
        raise ValueError("linear_cross_entropy needs a frozen output projection")
    return _LinearCrossEntropy.apply(hidden, weight, labels)
