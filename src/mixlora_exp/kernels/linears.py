"""LoRA and DoRA of linear layers that share their input, as one function of it.

What is not a plain product takes five steps, which `steps_on` a device gives: Triton kernels,
tensor operations for the compiler to fuse, or operations in place for eager code on a CPU. Beside
the frozen products a group of G projections takes on a GPU, forward, one launch for all `A x` and
one per projection; backward, two per projection, one for all gradients of A and one for that of x.
Kept for the backward pass are x, `A x` and, for DoRA, the frozen product, on a CPU with what A and
B add to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels import eager_linear, plain_linear
from mixlora_exp.kernels.frozen import Frozen
from mixlora_exp.kernels.lora import PER_PART, LowRankPart, described, flat, rebuilt

__all__ = ["linears", "steps_on"]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def steps_on(device: torch.device) -> ModuleType | None:
    """The steps of `linears` on a device; None on a GPU without Triton, where `lora_add` serves."""
    if device.type == "cuda" and HAS_TRITON:
        from mixlora_exp.kernels.triton import linear_launch

        return linear_launch
    if torch.compiler.is_compiling():
        return plain_linear
    return eager_linear if device.type == "cpu" else None


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """`one other` in a dtype, on a GPU without a copy in another."""
    if one.is_cuda and dtype == torch.float32 != one.dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frozen, spec, x, *tensors):
        parts, steps = rebuilt(spec, tensors), steps_on(x.device)
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
        ctx.frozen, ctx.spec = frozen, spec
        ctx.save_for_backward(x, *lows, *raws, *tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        with torch.autocast(dys[0].device.type, enabled=False):
            return _gradients(ctx, dys)


def _gradients(ctx, dys: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `_Linears.forward`."""
    count = len(dys)
    x, *rest = ctx.saved_tensors
    lows, raws, tensors = rest[:count], rest[count : 2 * count], rest[2 * count :]
    parts, steps = rebuilt(ctx.spec, tensors), steps_on(x.device)
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
    if ctx.needs_input_grad[2]:
        through = [base.input_gradient(dy) for base, dy in zip(ctx.frozen, draws, strict=True)]
        dx = steps.input_gradient(through, dlows, parts)
    own = []
    for da, db, dmagnitude in zip(das, dbs, dmagnitudes, strict=True):
        own += [da, db, dmagnitude, *[None] * (PER_PART - 3)]
    return None, None, dx, *own


def linears(
    x: Tensor, frozen: Sequence[Frozen], parts: Sequence[LowRankPart]
) -> tuple[Tensor, ...]:
    """`scale_g (W_g x + s_g B_g A_g drop_g(x))` of each projection, without bias, where
    `steps_on(x.device).supports` them.

    x: (T, D); returns (T, F_g) in its dtype.
    """
    return _Linears.apply(tuple(frozen), described(parts), x.contiguous(), *flat(parts))
