"""LoRA and DoRA of one linear layer, fused: the base product once, no matrix of the weight's shape.

    y = scale * (W x + s B A drop(x)) + bias,   scale = m / ||W + s B A||  (1 for LoRA)

PEFT's DoRA forms `B A` through an identity matrix in each forward pass, takes the norm of
`W + s B A` and, with dropout, runs a second frozen product on the dropped input; here the norm is
given (`dora_norms`) and dropout acts on the low-rank branch alone, as it does in LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mixlora_exp.kernels.dropout import DropMask, drop

__all__ = ["lora_add", "lora_add_reference", "lora_linear", "lora_linear_reference"]


def _low_rank_gradients(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor | None,
    norm: Tensor | None,
    mask: DropMask | None,
    low: Tensor,
    unscaled: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of (base product, `A x`, A, B, magnitude) from that of the result."""
    dmagnitude = None
    if magnitude is not None:
        dmagnitude = (dy * unscaled).sum(dim=0, dtype=norm.dtype) / norm
        dmagnitude = dmagnitude.to(magnitude.dtype)
        dy = dy * (magnitude / norm).to(dy.dtype)
    dlow = (dy @ b.to(dy.dtype)) * factor
    db = ((dy.T @ low) * factor).to(b.dtype)
    da = (dlow.T @ (x if mask is None else mask.zero(x))).to(a.dtype)
    return dy, dlow, da, db, dmagnitude


def _reduced(
    ctx: Any,
    x: Tensor,
    a: Tensor,
    scaling: float,
    elements: Tensor | None,
    described: tuple[float, tuple[int, int]] | None,
) -> Tensor:
    """`A drop(x)`; leaves in ctx what the backward pass needs of scaling and mask."""
    mask = None if described is None else DropMask(elements, *described)
    ctx.factor = scaling * (1.0 if mask is None else mask.scale)
    ctx.described = described
    return functional.linear(x if mask is None else mask.zero(x), a.to(x.dtype))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, magnitude, norm, scaling, elements, described):
        low = _reduced(ctx, x, a, scaling, elements, described)
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
        dy, dlow, da, db, dmagnitude = _low_rank_gradients(
            dy, x, a, b, magnitude, norm, mask, low, unscaled, ctx.factor
        )
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


class _LoraAdd(torch.autograd.Function):
    """`_LoraLinear` without its base product."""

    @staticmethod
    def forward(ctx, frozen, x, a, b, magnitude, norm, scaling, elements, described):
        low = _reduced(ctx, x, a, scaling, elements, described)
        y = torch.addmm(frozen, low, b.to(x.dtype).T, alpha=ctx.factor)
        unscaled = None
        if magnitude is not None:
            unscaled, y = y, y * (magnitude / norm).to(y.dtype)
        ctx.save_for_backward(x, a, b, magnitude, norm, elements, low, unscaled)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _LoraAdd._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx, dy):
        x, a, b, magnitude, norm, elements, low, unscaled = ctx.saved_tensors
        mask = None if ctx.described is None else DropMask(elements, *ctx.described)
        dy, dlow, da, db, dmagnitude = _low_rank_gradients(
            dy, x, a, b, magnitude, norm, mask, low, unscaled, ctx.factor
        )
        dx = None
        if ctx.needs_input_grad[1]:
            dx = dlow @ a.to(dy.dtype)
            dx = dx if mask is None else mask.zero(dx)
        return dy, dx, da, db, dmagnitude, None, None, None, None


def lora_add(
    frozen: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    mask: DropMask | None = None,
) -> Tensor:
    """`scale * (frozen + s B A drop(x))`: `lora_linear` of rows whose base product (T, out) is
    there already, since it ran over the rows of several adapters at once."""
    described = None if mask is None else (mask.scale, mask.shape)
    elements = None if mask is None else mask.elements
    return _LoraAdd.apply(frozen, x, a, b, magnitude, norm, scaling, elements, described)


def lora_add_reference(
    frozen: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    mask: DropMask | None = None,
) -> Tensor:
    """The same by plain operations."""
    y = frozen + scaling * (drop(x, mask) @ a.to(x.dtype).T @ b.to(x.dtype).T)
    return y if magnitude is None else y * (magnitude / norm).to(y.dtype)


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
    return lora_add_reference(
        x @ weight.T, x, a, b, scaling, magnitude=magnitude, norm=norm, mask=mask
    )
