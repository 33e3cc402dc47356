"""LoRA and DoRA of linear layers that share their input, as one function of it.

    y_g = scale_g (W_g x + s_g B_g A_g drop_g(x)),   scale = m / ||W + s B A||  (1 for LoRA)

No matrix of a weight's shape is made. PEFT's DoRA forms `B A` through an identity matrix in each
forward pass, takes the norm of `W + s B A` and, with dropout, runs a second frozen product on the
dropped input; here the norm is given (`dora_norms`) and dropout acts on the low-rank branch alone,
as it does in LoRA. The layer's bias comes after this.

What is not a plain product takes five steps, which `steps_on` a device gives: Triton kernels,
tensor operations for the compiler to fuse, or operations in place for eager code on a CPU. Beside
the frozen products a group of G projections takes on a GPU, forward, one launch for all `A x` and
one per projection; backward, two per projection, one for all gradients of A and one for that of x.
Kept for the backward pass are x, `A x` and, for DoRA, the frozen product, on a CPU with what A and
B add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels import eager_linear, plain_linear
from mixlora_exp.kernels.dropout import HAS_TRITON
from mixlora_exp.kernels.frozen import Frozen
from mixlora_exp.kernels.low_rank import PER_PART, LowRankPart, described, flat, rebuilt

__all__ = ["lora_linears", "steps_on"]


def steps_on(device: torch.device) -> ModuleType:
    """Return the module with the steps of `lora_linears` for a device."""
    if device.type == "cuda" and HAS_TRITON:
        from mixlora_exp.kernels.triton import linear_launch

        return linear_launch
    if torch.compiler.is_compiling():
        return plain_linear
    return eager_linear if device.type == "cpu" else plain_linear


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `one other` in a dtype, on a GPU without a copy in another."""
    if one.is_cuda and dtype == torch.float32 != one.dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frozen, spec, plain, x, *tensors):
        parts, steps = rebuilt(spec, tensors), plain_linear if plain else steps_on(x.device)
        lows = steps.low(x, parts)
        ys, raws = [], []
        for base, part, low in zip(frozen, parts, lows, strict=True):
            raw = base.linear(x)
            if part.magnitude is None:
                ys.append(raw.addmm_(low, part.b_in(x.dtype).T, alpha=steps.missing(part)))
                raws.append(None)
            else:
                ys.append(steps.scaled(raw, low, part))
                raws.append(raw)
        ctx.frozen, ctx.spec, ctx.plain = frozen, spec, plain
        ctx.save_for_backward(x, *lows, *raws, *tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        with torch.autocast(dys[0].device.type, enabled=False):
            return _gradients(ctx, dys)


def _gradients(ctx, dys: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of `_LoraLinears.forward`."""
    count = len(dys)
    x, *rest = ctx.saved_tensors
    lows, raws, tensors = rest[:count], rest[count : 2 * count], rest[2 * count :]
    parts, steps = rebuilt(ctx.spec, tensors), plain_linear if ctx.plain else steps_on(x.device)
    draws, dlows, dbs, dmagnitudes = [], [], [], []
    for dy, low, raw, part in zip(dys, lows, raws, parts, strict=True):
        dmagnitude = None
        if raw is None:
            draw = dy.contiguous()
            db = _product(draw.T, low, part.b.dtype)
            db = db if steps.missing(part) == 1 else db * steps.missing(part)
        else:
            draw, db, dmagnitude = steps.unscaled(dy.contiguous(), raw, low, part)
        draws.append(draw)
        dlows.append(draw @ part.b_in(x.dtype))
        dbs.append(db)
        dmagnitudes.append(dmagnitude)
    das = steps.gradients_of_a(x, dlows, parts)
    dx = None
    # A compiler may not know yet that x needs one, where x comes of such functions alone: that of
    # torch 2.11 left out the gradient through attention. It drops by itself what nothing needs.
    if ctx.needs_input_grad[3] or torch.compiler.is_compiling():
        through = [base.input_gradient(dy) for base, dy in zip(ctx.frozen, draws, strict=True)]
        dx = steps.input_gradient(through, dlows, parts)
    own = []
    for da, db, dmagnitude in zip(das, dbs, dmagnitudes, strict=True):
        own += [da, db, dmagnitude, *[None] * (PER_PART - 3)]
    return None, None, None, dx, *own


def lora_linears(
    x: Tensor, frozen: Sequence[Frozen], parts: Sequence[LowRankPart]
) -> tuple[Tensor, ...]:
    """Return `scale_g (W_g x + s_g B_g A_g drop_g(x))` of each projection, without bias.

    x: (T, D); frozen: W_g (F_g, D); parts: one adapter per projection. Each result is (T, F_g) in
    the dtype of x.

    Raises:
        ValueError: a frozen weight asks for a gradient, which this function does not compute.
    """
    if any(base.requires_grad for base in frozen):
        raise ValueError("the weight below a fused LoRA must be frozen")
    plain = not steps_on(x.device).supports(x, parts)
    return _LoraLinears.apply(tuple(frozen), described(parts), plain, x.contiguous(), *flat(parts))
