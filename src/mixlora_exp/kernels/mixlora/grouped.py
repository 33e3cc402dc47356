"""The exact kernel with tokens grouped by expert: the form for a CPU.

Each expert's low-rank products run over its own rows alone, so they cost K R columns per token
whatever E is. Sorting reads the experts' counts on the host. Tokens go through in blocks, which
bounds the memory: it grows neither with K nor with T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.activations import activate, activation_gradient
from mixlora_exp.kernels.mixlora.rows import Rows, blocks, sort_rows
from mixlora_exp.kernels.shapes import FeedForward, Gradients, LowRank, low_ranks

__all__ = ["Hidden", "Lows", "backward", "forward", "hidden_of", "sides_backward"]

Lows = dict[str, LowRank | None]


@dataclass(slots=True)
class Hidden:
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


def hidden_of(
    rows: Rows, x_low: Tensor, gate: Tensor, up: Tensor, block: FeedForward, lows: Lows
) -> Hidden:
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
    return Hidden(x, a, *reduced, gate, raw_gate, up, raw_up, active, hidden, hidden_low)


def forward(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """(y without the down projection's bias, what backward needs beside its arguments).

    x: (T, D); gate, up: (T, F), the frozen products; experts, weights: (T, K). The second result
    (T, K, D) is the down projection before DoRA's scale, None without DoRA."""
    lows = low_ranks(block, x.dtype)
    down = lows["down"]
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    y, kept = torch.empty_like(x), None
    if down is not None and down.scale is not None:
        kept = x.new_empty(*experts.shape, x.shape[1])
    for first, end in blocks(*experts.shape):
        rows = sort_rows(experts[first:end], weights[first:end], block.num_experts, x.dtype)
        part = block.slice(first, end)
        h = hidden_of(rows, x_low[first:end], gate[first:end], up[first:end], part, lows)
        low = None if down is None else rows.multiply(h.hidden_low, down.a.transpose(1, 2))
        shares = weights[first:end].to(x.dtype)
        if kept is not None:
            out = functional.linear(h.hidden, block.down.weight)
            rows.add_product(out, low, down.b.transpose(1, 2), down.factor)
            kept[first:end] = out[rows.position]
            y[first:end] = rows.combine(rows.scaled(out, down.scale), shares)
            continue
        mixed = rows.combine(h.hidden, shares)
        torch.mm(mixed, block.down.weight.T, out=y[first:end])
        if low is not None:
            low.mul_(down.factor)
            y[first:end] += rows.combine(rows.multiply(low, down.b.transpose(1, 2)), shares)
    return y, kept


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    experts: Tensor,
    weights: Tensor,
    block: FeedForward,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Gradients]:
    """(dx, dweights, gradients of the adapters) from dy (T, D); the others as in `forward`."""
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    dx, dweights = torch.empty_like(x), torch.empty_like(weights)
    lows, gradients = low_ranks(block, x.dtype), Gradients(block)
    for first, end in blocks(*experts.shape):
        rows = sort_rows(experts[first:end], weights[first:end], block.num_experts, x.dtype)
        part = block.slice(first, end)
        h = hidden_of(rows, x_low[first:end], gate[first:end], up[first:end], part, lows)
        raw = None if kept is None else kept[first:end]
        dhidden, dpairs = _down_backward(rows, dy[first:end], raw, h, part, lows, gradients)
        dweights[first:end] = dpairs[rows.position]
        dup = dhidden * h.active
        dgate = activation_gradient(dhidden.mul_(h.up), h.gate, block.activation)
        frozen, dx_low = sides_backward(rows, dgate, dup, h, lows, gradients)
        part_dx = (frozen[0] @ block.gate.weight).addmm_(frozen[1], block.up.weight)
        if dx_low is not None:
            mask = part.x_mask
            part_dx += dx_low if mask is None else mask.zero(dx_low)
        dx[first:end] = part_dx
    return dx, dweights, gradients


def _down_backward(
    rows: Rows,
    dy: Tensor,
    raw: Tensor | None,
    h: Hidden,
    block: FeedForward,
    lows: Lows,
    gradients: Gradients,
) -> tuple[Tensor, Tensor]:
    """(dhidden (rows, F), dweights (rows,)). dy: (tokens, D); raw: (tokens, K, D)."""
    down = lows["down"]
    if down is None:
        dhidden = (dy @ block.down.weight).index_select(0, rows.tokens)
        dweights = (dhidden * h.hidden).sum(dim=-1)
        return dhidden.mul_(rows.weights), dweights
    low = rows.multiply(h.hidden_low, down.a.transpose(1, 2))
    dout = dy.index_select(0, rows.tokens)
    if raw is None:
        dhidden = (dy @ block.down.weight).index_select(0, rows.tokens)
        dlow = rows.multiply(dout, down.b)
        dweights = (dhidden * h.hidden).sum(dim=-1) + down.factor * (dlow * low).sum(dim=-1)
        dhidden *= rows.weights
        dlow *= rows.weights * down.factor
        rows.add_outer(gradients.b["down"], dout, low * (rows.weights * down.factor))
    else:
        out = raw.flatten(0, 1).new_zeros(len(rows.tokens), dy.shape[1])
        out[rows.position.flatten()] = raw.flatten(0, 1)
        dweights = (dout * rows.scaled(out, down.scale)).sum(dim=-1)
        dout *= rows.weights
        rows.add_sums(gradients.magnitude["down"], dout * out)
        dout = rows.scaled(dout, down.scale)
        dhidden = dout @ block.down.weight
        dlow = rows.multiply(dout, down.b) * down.factor
        rows.add_outer(gradients.b["down"], dout, low * down.factor)
    rows.add_outer(gradients.a["down"], dlow, h.hidden_low)
    if block.hidden_mask is None:
        rows.add_product(dhidden, dlow, down.a)
    else:
        dhidden += rows.zero(rows.multiply(dlow, down.a), block.hidden_mask)
    return dhidden, dweights


def sides_backward(
    rows: Rows,
    dgate: Tensor,
    dup: Tensor,
    h: Hidden,
    lows: Lows,
    gradients: Gradients,
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
