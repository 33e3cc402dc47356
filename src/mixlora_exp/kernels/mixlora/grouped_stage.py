"""The grouped form without its frozen products, which several adapters share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mixlora_exp.kernels.activations import activation_gradient
from mixlora_exp.kernels.mixlora.grouped import Hidden, Lows, hidden_of, sides_backward
from mixlora_exp.kernels.mixlora.packing import pack, unpack
from mixlora_exp.kernels.mixlora.rows import Rows, blocks, sort_rows
from mixlora_exp.kernels.shapes import FeedForward, Gradients, low_ranks

__all__ = ["grouped_hidden", "scaled_sum"]


def _forward(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    lows = low_ranks(block, x.dtype)
    down = lows["down"]
    per_slot = block.down.has_scale
    slots = tuple(experts.shape) if per_slot else (len(x),)
    hidden = x.new_empty(*slots, gate.shape[1])
    added = None if down is None else x.new_empty(*slots, x.shape[1])
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    for first, end in blocks(*experts.shape):
        rows = sort_rows(experts[first:end], weights[first:end], block.num_experts, x.dtype)
        part = block.slice(first, end)
        h = hidden_of(rows, x_low[first:end], gate[first:end], up[first:end], part, lows)
        shares = weights[first:end].to(x.dtype)
        hidden[first:end] = h.hidden[rows.position] if per_slot else rows.combine(h.hidden, shares)
        if down is not None:
            low = rows.multiply(h.hidden_low, down.a.transpose(1, 2)).mul_(down.factor)
            out = rows.multiply(low, down.b.transpose(1, 2))
            added[first:end] = out[rows.position] if per_slot else rows.combine(out, shares)
    return hidden, added


def _by_row(rows: Rows, slots: Tensor) -> Tensor:
    """(rows, width) of what is by slot, (tokens, K, width); rows that fill up are zero."""
    out = slots.new_zeros(len(rows.tokens), slots.shape[-1])
    out[rows.position.flatten()] = slots.flatten(0, 1)
    return out


def _down_backward(
    rows: Rows,
    dhidden: Tensor,
    dadded: Tensor | None,
    h: Hidden,
    block: FeedForward,
    lows: Lows,
    gradients: Gradients,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of the rows' hidden states, of the router's weights by row: None per slot, where
    they are applied later)."""
    down, per_slot, dweights = lows["down"], block.down.has_scale, None
    dhidden = _by_row(rows, dhidden) if per_slot else dhidden.index_select(0, rows.tokens)
    if not per_slot:
        dweights = (dhidden * h.hidden).sum(dim=-1)
        dhidden *= rows.weights
    if down is None:
        return dhidden, dweights
    dout = _by_row(rows, dadded) if per_slot else dadded.index_select(0, rows.tokens)
    low = rows.multiply(h.hidden_low, down.a.transpose(1, 2))
    dlow = rows.multiply(dout, down.b)
    factor = down.factor
    if not per_slot:
        dweights = dweights + down.factor * (dlow * low).sum(dim=-1)
        factor = rows.weights * down.factor
    dlow = dlow * factor
    rows.add_outer(gradients.b["down"], dout, low * factor)
    rows.add_outer(gradients.a["down"], dlow, h.hidden_low)
    if block.hidden_mask is None:
        rows.add_product(dhidden, dlow, down.a)
    else:
        dhidden += rows.zero(rows.multiply(dlow, down.a), block.hidden_mask)
    return dhidden, dweights


class _GroupedHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, gate, up, weights, experts, *tensors):
        ctx.spec = spec
        ctx.save_for_backward(x, gate, up, weights, experts, *tensors)
        return _forward(x, gate, up, experts, weights, unpack(spec, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, dhidden, dadded):
        x, gate, up, weights, experts, *tensors = ctx.saved_tensors
        block = unpack(ctx.spec, tensors)
        x_low = x if block.x_mask is None else block.x_mask.zero(x)
        dx = torch.zeros_like(x)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        dweights = torch.zeros_like(weights)
        lows, gradients = low_ranks(block, x.dtype), Gradients(block)
        with torch.autocast(x.device.type, enabled=False):
            for first, end in blocks(*experts.shape):
                span = slice(first, end)
                rows = sort_rows(experts[span], weights[span], block.num_experts, x.dtype)
                part = block.slice(first, end)
                h = hidden_of(rows, x_low[span], gate[span], up[span], part, lows)
                part_dadded = None if dadded is None else dadded[span]
                dh, dpairs = _down_backward(
                    rows, dhidden[span], part_dadded, h, part, lows, gradients
                )
                if dpairs is not None:
                    dweights[span] = dpairs[rows.position]
                side_up = dh * h.active
                side_gate = activation_gradient(dh.mul_(h.up), h.gate, block.activation)
                (dgate[span], dup[span]), dx_low = sides_backward(
                    rows, side_gate, side_up, h, lows, gradients
                )
                if dx_low is not None:
                    mask = part.x_mask
                    dx[span] = dx_low if mask is None else mask.zero(dx_low)
        # Of the down projection's magnitude `finish` has the gradient.
        flat = gradients.flat(block)
        return None, dx, dgate, dup, dweights, None, *flat


def grouped_hidden(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """(hidden, added): what the down projection takes, and what its experts add to its product.

    x: (T, D); gate, up: (T, F), the frozen products; experts, weights: (T, K). Without DoRA on the
    down projection both are summed over the slots with the router's weights, (T, F) and (T, D);
    with it they are per slot, (T, K, F) and (T, K, D), before its scale. `added` is None where the
    down projection has no experts.
    """
    spec, tensors = pack(block)
    return _GroupedHidden.apply(spec, x, gate, up, weights, experts, *tensors)


class _ScaledSum(torch.autograd.Function):
    """Keeps the slots' outputs alone, where plain operations keep three tensors of that size."""

    @staticmethod
    def forward(ctx, y, experts, weights, scale):
        ctx.save_for_backward(y, experts, weights, scale)
        shares = weights.to(y.dtype).unsqueeze(-1)
        return (y * functional.embedding(experts, scale) * shares).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, experts, weights, scale = ctx.saved_tensors
        scales = functional.embedding(experts, scale)
        shares = weights.to(y.dtype).unsqueeze(-1)
        dy = dy.unsqueeze(1)
        products = dy * y
        dweights = (products * scales).sum(dim=-1).to(weights.dtype)
        chosen = functional.one_hot(experts.flatten(), scale.shape[0]).to(y.dtype)
        # A product, not an addition by index: the same input gives the same bits on a GPU.
        dscale = chosen.T @ (products * shares).flatten(0, 1)
        return dy * scales * shares, None, dweights, dscale


def scaled_sum(y: Tensor, experts: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """`sum_k w_k scale_{e_k} y_k`: DoRA's scale of the slots' outputs, and their mixture, (T, D).

    y: (T, K, D); experts, weights: (T, K); scale: (E, D)."""
    return _ScaledSum.apply(y, experts, weights, scale)
