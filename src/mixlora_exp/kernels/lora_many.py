"""LoRA and DoRA of several adapters in one linear layer, added to its frozen product.

Adapters of one shape on equal shares of the rows are one batched product: up to three times as fast
on a CPU as one by one, and one launch instead of M on a GPU. One adapter is a batch of one. Where
one adapter has all rows, `kernels.lora` serves instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.low_rank import PER_PART, LowRankPart, described, flat, rebuilt
from mixlora_exp.kernels.shapes import stacked

__all__ = ["lora_add", "lora_add_reference"]


def _dropped(rows: Tensor, parts: Sequence[LowRankPart]) -> Tensor:
    """Return (M, T, in) with each adapter's dropped elements zero."""
    if all(part.mask is None for part in parts):
        return rows
    return stacked(
        [row if p.mask is None else p.mask.zero(row) for row, p in zip(rows, parts, strict=True)]
    )


def _times(low: Tensor, parts: Sequence[LowRankPart]) -> Tensor:
    """Return each adapter's (T, R) times its factor."""
    factors = [part.factor for part in parts]
    if len(factors) == 1:
        return low * factors[0]
    return low * torch.tensor(factors, dtype=low.dtype, device=low.device).view(-1, 1, 1)


def _scales(parts: Sequence[LowRankPart], dtype: torch.dtype) -> Tensor:
    """Return DoRA's `m / ||W + s B A||`, (M, 1, out)."""
    return stacked([p.scale_in(dtype) for p in parts]).unsqueeze(1)


class _LoraAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, frozen, x, *tensors):
        parts, count = rebuilt(spec, tensors), len(spec)
        a = stacked([part.a_in(x.dtype) for part in parts])
        b = stacked([part.b_in(x.dtype) for part in parts])
        rows = x.view(count, len(x) // count, x.shape[1])
        low = torch.bmm(_dropped(rows, parts), a.transpose(1, 2))
        y = frozen.reshape(count, rows.shape[1], frozen.shape[1])
        y = torch.baddbmm(y, _times(low, parts), b.transpose(1, 2))
        unscaled = None
        if parts[0].magnitude is not None:
            unscaled, y = y, y * _scales(parts, y.dtype)
        ctx.spec = spec
        ctx.save_for_backward(x, low, unscaled, *tensors)
        return y.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _LoraAdd._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx, dy):
        x, low, unscaled, *tensors = ctx.saved_tensors
        parts, count = rebuilt(ctx.spec, tensors), len(ctx.spec)
        a = stacked([part.a_in(x.dtype) for part in parts])
        b = stacked([part.b_in(x.dtype) for part in parts])
        dy = dy.reshape(count, len(x) // count, dy.shape[1])
        rows = x.view(count, dy.shape[1], x.shape[1])
        dmagnitudes: list[Tensor | None] = [None] * count
        if unscaled is not None:
            sums = (dy * unscaled).sum(dim=1, dtype=parts[0].norm.dtype)
            dmagnitudes = [
                (s / p.norm).to(p.magnitude.dtype) for s, p in zip(sums, parts, strict=True)
            ]
            dy = dy * _scales(parts, dy.dtype)
        dlow = _times(torch.bmm(dy, b), parts)
        db = _times(torch.bmm(dy.transpose(1, 2), low), parts)
        da = torch.bmm(dlow.transpose(1, 2), _dropped(rows, parts))
        dx = None
        if ctx.needs_input_grad[2]:
            dx = _dropped(torch.bmm(dlow, a), parts).flatten(0, 1)
        own: list[Tensor | None] = []
        for one_a, one_b, magnitude, p in zip(da, db, dmagnitudes, parts, strict=True):
            own += [one_a.to(p.a.dtype), one_b.to(p.b.dtype), magnitude]
            own += [None] * (PER_PART - 3)
        return None, dy.flatten(0, 1), dx, *own


def lora_add(frozen: Tensor, x: Tensor, *parts: LowRankPart) -> Tensor:
    """Compute `scale_m (frozen_m + s_m B_m A_m drop_m(x_m))` for the m-th of M equal shares of the
    rows.

    frozen: (M T, out), the base product; x: (M T, in); parts: M adapters, all of one rank, all with
    DoRA or all without. Returns (M T, out) in the dtype of x. No adapter's values reach another's
    rows or gradients.
    """
    return _LoraAdd.apply(described(parts), frozen, x.contiguous(), *flat(parts))


def lora_add_reference(frozen: Tensor, x: Tensor, *parts: LowRankPart) -> Tensor:
    """Compute `lora_add` by plain operations: its definition, and the reference in tests."""
    made = []
    shares = zip(frozen.tensor_split(len(parts)), x.tensor_split(len(parts)), parts, strict=True)
    for y, rows, part in shares:
        y = y + part.scaling * (drop(rows, part.mask) @ part.a.to(x.dtype).T @ part.b.to(x.dtype).T)
        if part.magnitude is not None:
            y = y * (part.magnitude / part.norm).to(y.dtype)
        made.append(y)
    return torch.cat(made)
