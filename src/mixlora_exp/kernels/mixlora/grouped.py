"""The exact kernel's stage with tokens grouped by expert: the form for a CPU.

Each expert's low-rank products run over its own rows alone, so they cost K R columns per token
whatever E is. Sorting reads the experts' counts on the host. Tokens go through in blocks, which
bounds the memory of what lies between. Kept for the backward pass are x, the frozen products and
the routing; the rest is computed again from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.activations import activate, activation_gradient
from mixlora_exp.kernels.mixlora.packing import pack, unpack
from mixlora_exp.kernels.mixlora.rows import Rows, blocks, sort_rows, sum_by_token
from mixlora_exp.kernels.mixlora.stage import Finish, add_down_bias
from mixlora_exp.kernels.shapes import (
    FeedForward,
    Gradients,
    LowRank,
    Routing,
    low_ranks,
    scale_of,
)

__all__ = ["grouped_stage"]

Lows = dict[str, LowRank | None]


@dataclass(slots=True)
class _Hidden:
    """Gate, up and hidden state of a block's rows, (rows, F) each, and what led to them.

    `raw_*` are gate and up before DoRA's scale; `low_*` (rows, R) are `A x`; `a` (E, R or 2 R, D)
    is A of gate and up together, since both read the same x.
    """

    x: Tensor
    a: Tensor | None
    low_gate: Tensor | None
    low_up: Tensor | None
    gate: Tensor
    raw_gate: Tensor
    up: Tensor
    raw_up: Tensor
    active: Tensor
    hidden: Tensor
    hidden_low: Tensor


def _adapt(
    rows: Rows,
    frozen: Tensor,
    low: Tensor | None,
    projection: LowRank | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(value, value before DoRA's scale, if there is one) of the rows. frozen: (tokens, F)."""
    value = raw = frozen.index_select(0, rows.tokens)
    if projection is not None and low is not None:
        rows.add_product(raw, low, projection.b.transpose(1, 2), projection.factor)
        if projection.scale is not None:
            value = rows.scaled(raw, projection.scale)
    if bias is not None:
        value += bias
    return value, raw


def _hidden_of(
    rows: Rows, x_low: Tensor, gate: Tensor, up: Tensor, block: FeedForward, lows: Lows
) -> _Hidden:
    """x_low, gate, up: of the block's tokens; block: with its masks cut to them."""
    sides = [lows["gate"], lows["up"]]
    x = x_low.index_select(0, rows.tokens)
    present = [side.a for side in sides if side is not None]
    a, reduced = None, [None, None]
    if present:
        a = present[0] if len(present) == 1 else torch.cat(present, dim=1)
        parts = iter(rows.multiply(x, a.transpose(1, 2)).split([p.shape[1] for p in present], 1))
        reduced = [None if side is None else next(parts) for side in sides]
    gate, raw_gate = _adapt(rows, gate, reduced[0], sides[0], block.gate.bias)
    up, raw_up = _adapt(rows, up, reduced[1], sides[1], block.up.bias)
    active = activate(gate, block.activation)
    hidden = active * up
    mask = block.hidden_mask
    hidden_low = hidden if mask is None else rows.zero(hidden, mask)
    return _Hidden(x, a, *reduced, gate, raw_gate, up, raw_up, active, hidden, hidden_low)


def _forward(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """(hidden, added): what the down projection takes, and what its experts add to its product.

    x: (T, D); gate, up: (T, F); experts, weights: (T, K). Without DoRA on the down projection both
    are summed over the slots with the router's weights, (T, F) and (T, D); with it they are by
    filled slot, (P, F) and (P, D), before its scale. `added` is None where it has no experts.
    """
    lows = low_ranks(block, x.dtype)
    down = lows["down"]
    per_slot = block.down.has_scale
    count = int((weights != 0).sum()) if per_slot else len(x)
    hidden = x.new_empty(count, gate.shape[1])
    added = None if down is None else x.new_empty(count, x.shape[1])
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    done = 0
    for first, end in blocks(*experts.shape):
        rows = sort_rows(experts[first:end], weights[first:end], block.num_experts, x.dtype)
        part = block.slice(first, end)
        h = _hidden_of(rows, x_low[first:end], gate[first:end], up[first:end], part, lows)
        span = slice(done, done + (len(rows.pairs) if per_slot else end - first))
        done = span.stop

        def mixed(values: Tensor, rows: Rows = rows) -> Tensor:
            return values[rows.position] if per_slot else rows.combine(values, weighted=True)

        hidden[span] = mixed(h.hidden)
        if down is not None:
            low = rows.multiply(h.hidden_low, down.a.transpose(1, 2)).mul_(down.factor)
            added[span] = mixed(rows.multiply(low, down.b.transpose(1, 2)))
    return hidden, added


def _down_backward(
    rows: Rows,
    dhidden: Tensor,
    dadded: Tensor | None,
    h: _Hidden,
    block: FeedForward,
    lows: Lows,
    gradients: Gradients,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of the rows' hidden states, of the router's weights by row: None per slot, where
    they are applied later)."""
    down, per_slot, dweights = lows["down"], block.down.has_scale, None

    def by_row(values: Tensor) -> Tensor:
        return rows.of_pairs(values) if per_slot else values.index_select(0, rows.tokens)

    dhidden = by_row(dhidden)
    if not per_slot:
        dweights = (dhidden * h.hidden).sum(dim=-1)
        dhidden *= rows.weights
    if down is None:
        return dhidden, dweights
    dout = by_row(dadded)
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


def _sides_backward(
    rows: Rows, dgate: Tensor, dup: Tensor, h: _Hidden, lows: Lows, gradients: Gradients
) -> tuple[list[Tensor], Tensor | None]:
    """(gradients of the frozen products of gate and up, (tokens, F) each; dx through the experts,
    (tokens, D), None without any)."""
    frozen, dlows, sizes = [], [], []
    sides = (("gate", dgate, h.raw_gate, h.low_gate), ("up", dup, h.raw_up, h.low_up))
    for role, grad, raw, low in sides:
        adapter = lows[role]
        if adapter is not None:
            if adapter.scale is not None:
                rows.add_sums(gradients.magnitude[role], grad * raw)
                grad = rows.scaled(grad, adapter.scale)
            rows.add_outer(gradients.b[role], grad, low * adapter.factor)
            dlows.append((role, rows.multiply(grad, adapter.b) * adapter.factor))
            sizes.append(adapter.a.shape[1])
        frozen.append(rows.combine(grad))
    if not dlows:
        return frozen, None
    dlow = dlows[0][1] if len(dlows) == 1 else torch.cat([part for _, part in dlows], dim=1)
    da = gradients.a[dlows[0][0]].new_zeros(h.a.shape)
    rows.add_outer(da, dlow, h.x)
    for (role, _), part in zip(dlows, da.split(sizes, dim=1), strict=True):
        gradients.a[role] += part
    return frozen, rows.combine(rows.multiply(dlow, h.a))


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
        per_slot = block.down.has_scale
        x_low = x if block.x_mask is None else block.x_mask.zero(x)
        dx = torch.zeros_like(x)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        dweights = torch.zeros_like(weights)
        lows, gradients, done = low_ranks(block, x.dtype), Gradients(block, x.dtype), 0
        with torch.autocast(x.device.type, enabled=False):
            for first, end in blocks(*experts.shape):
                span = slice(first, end)
                rows = sort_rows(experts[span], weights[span], block.num_experts, x.dtype)
                part = block.slice(first, end)
                h = _hidden_of(rows, x_low[span], gate[span], up[span], part, lows)
                made = slice(done, done + (len(rows.pairs) if per_slot else end - first))
                done = made.stop
                part_dadded = None if dadded is None else dadded[made]
                dh, dpairs = _down_backward(
                    rows, dhidden[made], part_dadded, h, part, lows, gradients
                )
                if dpairs is not None:
                    dweights[span].view(-1)[rows.pairs] = dpairs[rows.position].to(dweights.dtype)
                side_up = dh * h.active
                side_gate = activation_gradient(dh.mul_(h.up), h.gate, block.activation)
                (dgate[span], dup[span]), dx_low = _sides_backward(
                    rows, side_gate, side_up, h, lows, gradients
                )
                if dx_low is not None:
                    mask = part.x_mask
                    dx[span] = dx_low if mask is None else mask.zero(dx_low)
        # Of the down projection's magnitude `_ScaledSum` has the gradient.
        flat = gradients.flat(block)
        return None, dx, dgate, dup, dweights, None, *flat


class _ScaledSum(torch.autograd.Function):
    """`sum_k w_k scale_{e_k} y_k`: DoRA's scale of the filled slots' outputs, and their mixture.

    y: (P, D) by filled slot; experts, weights: (T, K); scale: (E, D). Keeps y alone, where plain
    operations keep three tensors of that size.
    """

    @staticmethod
    def forward(ctx, y, experts, weights, scale):
        ctx.save_for_backward(y, experts, weights, scale)
        filled = weights != 0
        scaled = y * scale[experts[filled]]
        shares = weights[filled].to(y.dtype)
        return sum_by_token(scaled, torch.arange(len(y)), filled.sum(dim=1), shares)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, experts, weights, scale = ctx.saved_tensors
        filled = weights != 0
        chosen, shares = experts[filled], weights[filled].to(y.dtype).unsqueeze(-1)
        scales = scale[chosen]
        dy = dy.index_select(0, filled.nonzero()[:, 0])
        products = dy * y
        dweights = torch.zeros_like(weights)
        dweights[filled] = (products * scales).sum(dim=-1).to(weights.dtype)
        dscale = torch.zeros_like(scale).index_add_(0, chosen, products * shares)
        return dy * scales * shares, None, dweights, dscale


def grouped_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """Tokens grouped by expert. It has no gradient for biases of gate and up."""
    experts, weights = routing.experts, routing.weights
    spec, tensors = pack(block)
    hidden, added = _GroupedHidden.apply(spec, x, gate, up, weights, experts, *tensors)

    def finish(y: Tensor) -> Tensor:
        y = y if added is None else y + added
        if block.down.has_scale:
            scale = scale_of(block.down.experts, y.dtype)
            y = _ScaledSum.apply(y, experts, weights, scale)
        return add_down_bias(y, weights, block)

    return hidden, finish
