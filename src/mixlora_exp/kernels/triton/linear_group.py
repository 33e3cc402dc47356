"""LoRA and DoRA of linear layers that share their input, with few launches on a GPU.

Beside the frozen products a group of G projections takes, forward, one launch for all `A x` and one
per projection; backward, two per projection, one for all gradients of A and one for that of x.
Nothing is kept for the backward pass but x, `A x` and, for DoRA, the frozen product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.dropout import HashMask
from mixlora_exp.kernels.frozen import Frozen
from mixlora_exp.kernels.lora import PER_PART, LowRankPart, described, flat, rebuilt
from mixlora_exp.kernels.triton import linear_launch as launch
from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["MAX_GROUP", "linears", "supports"]

MAX_GROUP = launch.MAX_GROUP


def _masks(parts: Sequence[LowRankPart]) -> tuple[list, list, list, list]:
    """What the kernels take of the masks: keys, places, thresholds; and the factors."""
    masks = [part.mask for part in parts]
    return (
        [None if mask is None else mask.elements for mask in masks],
        [0 if mask is None else mask.place for mask in masks],
        [0 if mask is None else mask.threshold for mask in masks],
        [part.factor for part in parts],
    )


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """`one other` in a dtype, without a copy in another."""
    if one.is_cuda and dtype == torch.float32 != one.dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frozen, spec, x, *tensors):
        parts = rebuilt(spec, tensors)
        lows = launch.low(x, [part.nearest(x.dtype).a for part in parts], *_masks(parts))
        ys, raws = [], []
        for base, part, low in zip(frozen, parts, lows, strict=True):
            raw = base.linear(x)
            if part.magnitude is None:
                ys.append(raw.addmm_(low, part.b_in(x.dtype).T))
                raws.append(None)
            else:
                b = part.nearest(x.dtype).b
                ys.append(launch.scaled(raw, low, b, part.magnitude, part.norm))
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
    """Of `_Linears.forward`'s arguments."""
    count = len(dys)
    x, *rest = ctx.saved_tensors
    lows, raws, tensors = rest[:count], rest[count : 2 * count], rest[2 * count :]
    parts = rebuilt(ctx.spec, tensors)
    draws, dlows, dbs, dmagnitudes = [], [], [], []
    for dy, low, raw, part in zip(dys, lows, raws, parts, strict=True):
        b, dy = part.b_in(x.dtype), dy.contiguous()
        dmagnitude = None
        if raw is None:
            db = _product(dy.T, low, part.b.dtype)
        else:
            dy, db, dmagnitude = launch.unscaled(
                dy, raw, low, b, part.magnitude, part.norm, part.b.dtype
            )
        draws.append(dy)
        dlows.append(dy @ b)
        dbs.append(db)
        dmagnitudes.append(dmagnitude)
    masks = _masks(parts)
    das = launch.gradients_of_a(x, dlows, [part.a for part in parts], *masks)
    dx = None
    if ctx.needs_input_grad[2]:
        through = [base.input_gradient(dy) for base, dy in zip(ctx.frozen, draws, strict=True)]
        a = [part.nearest(x.dtype).a for part in parts]
        dx = launch.input_gradient(through, dlows, a, *masks)
    own = []
    for da, db, dmagnitude in zip(das, dbs, dmagnitudes, strict=True):
        own += [da, db, dmagnitude, *[None] * (PER_PART - 3)]
    return None, None, dx, *own


def supports(x: Tensor, frozen: Sequence[Frozen], parts: Sequence[LowRankPart]) -> bool:
    """Whether the kernels compute these projections of x (T, D).

    They take float32, float16 and bfloat16 on a GPU of compute capability 8.0 or above, in the
    interpreter float32 and float16; frozen weights that ask for no gradient; ranks up to
    `max_rank`; masks made by a hash; and at least one token.
    """
    if INTERPRETED:
        known = x.dtype in (torch.float32, torch.float16)
    else:
        known = (
            x.is_cuda
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and torch.cuda.get_device_properties(x.device).major >= 8
        )
    return (
        known
        and x.shape[0] > 0
        and len(parts) <= MAX_GROUP
        and all(
            part.a.shape[0] <= launch.max_rank(x.dtype)
            and (part.mask is None or isinstance(part.mask, HashMask))
            and not base.requires_grad
            for base, part in zip(frozen, parts, strict=True)
        )
    )


def linears(
    x: Tensor, frozen: Sequence[Frozen], parts: Sequence[LowRankPart]
) -> tuple[Tensor, ...]:
    """`scale_g (W_g x + s_g B_g A_g drop_g(x))` of each projection, without bias; see `supports`.

    x: (T, D); returns (T, F_g) in its dtype.
    """
    return _Linears.apply(tuple(frozen), described(parts), x.contiguous(), *flat(parts))
