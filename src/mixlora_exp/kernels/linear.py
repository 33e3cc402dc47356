"""LoRA and DoRA of one linear layer, fused: the base product once, no matrix of the weight's shape.

    y = scale * (W x + s B A drop(x)) + bias,   scale = m / ||W + s B A||  (1 for LoRA)

PEFT's DoRA forms `B A` through an identity matrix in each forward pass, takes the norm of
`W + s B A` and, with dropout, runs a second frozen product on the dropped input; here the norm is
given (`dora_norms`) and dropout acts on the low-rank branch alone, as it does in LoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mixlora_exp.kernels.dropout import DropMask, drop

__all__ = ["lora_linear", "lora_linear_reference"]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, magnitude, norm, scaling, elements, described):
        mask = None if described is None else DropMask(elements, *described)
        ctx.factor = scaling * (1.0 if mask is None else mask.scale)
        ctx.described = described
        low = functional.linear(x if mask is None else mask.zero(x), a.to(x.dtype))
        y = functional.linear(x, weight).addmm_(low, b.to(x.dtype).T, alpha=ctx.factor)
        unscaled = None
        if magnitude is not None:
            unscaled, y = y, y * (magnitude / norm).to(y.dtype)
        ctx.save_for_backward(x, weight, a, b, magnitude, norm, elements, low, unscaled)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _LoraLinear._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx, dy):
        x, weight, a, b, magnitude, norm, elements, low, unscaled = ctx.saved_tensors
        mask = None if ctx.described is None else DropMask(elements, *ctx.described)
        dmagnitude = None
        if magnitude is not None:
            dmagnitude = (dy * unscaled).sum(dim=0, dtype=norm.dtype) / norm
            dmagnitude = dmagnitude.to(magnitude.dtype)
            dy = dy * (magnitude / norm).to(dy.dtype)
        dlow = (dy @ b.to(dy.dtype)) * ctx.factor
        db = ((dy.T @ low) * ctx.factor).to(b.dtype)
        da = (dlow.T @ (x if mask is None else mask.zero(x))).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if mask is None:
                dx.addmm_(dlow, a.to(dy.dtype))
            else:
                dx += mask.zero(dlow @ a.to(dy.dtype))
        return dx, None, da, db, dmagnitude, None, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    mask: DropMask | None = None,
) -> Tensor:
    """`scale * (W x + s B A drop(x))`. x: (T, in); weight: (out, in), frozen; a: (R, in);
    b: (out, R); magnitude, norm: (out,), both or none; returns (T, out) in the dtype of x."""
    described = None if mask is None else (mask.scale, mask.shape)
    elements = None if mask is None else mask.elements
    return _LoraLinear.apply(x, weight, a, b, magnitude, norm, scaling, elements, described)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    mask: DropMask | None = None,
) -> Tensor:
    """The same by plain operations: the definition, and the oracle of `lora_linear`."""
    low = drop(x, mask) @ a.to(x.dtype).T @ b.to(x.dtype).T
    y = x @ weight.T + scaling * low
    return y if magnitude is None else y * (magnitude / norm).to(y.dtype)
