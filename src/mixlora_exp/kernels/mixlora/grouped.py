"""The exact kernel's stage with tokens grouped by expert: the form for a CPU.

Each expert's low-rank products run over its own rows alone, so they cost K R columns per token
whatever E is. Sorting reads the experts' counts on the host. Tokens go through in blocks, which
bounds the memory of what lies between, and their rows in pieces that a cache holds. Kept for the
backward pass are x, the frozen products and the routing; the rest is computed again from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.activations import activate, activation_gradient
from mixlora_exp.kernels.mixlora.expert_segments import Piece, Rows, blocks, sort_rows
from mixlora_exp.kernels.mixlora.packing import pack, unpack
from mixlora_exp.kernels.mixlora.scaled_sum import scaled_sum
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
    """Gate, up and hidden state of a piece's rows, (rows, F) each, and what led to them.

    `raw_*` are gate and up before DoRA's scale; `low_*` (rows, R) are `A x`.
    """

    x: Tensor
    low_gate: Tensor | None
    low_up: Tensor | None
    gate: Tensor
    raw_gate: Tensor
    up: Tensor
    raw_up: Tensor
    active: Tensor
    hidden: Tensor


def _input_a(lows: Lows) -> Tensor | None:
    """Return A of gate and up together (E, R or 2 R, D), since both read the same x."""
    present = [lows[role].a for role in ("gate", "up") if lows[role] is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat(present, dim=1)


def _adapt(
    piece: Piece,
    frozen: Tensor,
    low: Tensor | None,
    projection: LowRank | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (value, value before DoRA's scale, if there is one) of the rows. frozen: (tokens,
    F)."""
    value = raw = piece.by_token(frozen)
    if projection is not None and low is not None:
        piece.add_product(raw, low, projection.b.transpose(1, 2), projection.factor)
        if projection.scale is not None:
            value = piece.scaled(raw, projection.scale)
    if bias is not None:
        value += bias
    return value, raw


def _hidden_of(
    piece: Piece,
    x_low: Tensor,
    gate: Tensor,
    up: Tensor,
    block: FeedForward,
    lows: Lows,
    a: Tensor | None,
) -> _Hidden:
    """Compute gate, up and hidden state of a piece's rows. x_low, gate, up: of the block's tokens;
    a: as of `_input_a`."""
    sides = [lows["gate"], lows["up"]]
    x, reduced = piece.by_token(x_low), [None, None]
    if a is not None:
        sizes = [side.a.shape[1] for side in sides if side is not None]
        parts = iter(piece.multiply(x, a.transpose(1, 2)).split(sizes, 1))
        reduced = [None if side is None else next(parts) for side in sides]
    gate, raw_gate = _adapt(piece, gate, reduced[0], sides[0], block.gate.bias)
    up, raw_up = _adapt(piece, up, reduced[1], sides[1], block.up.bias)
    active = activate(gate, block.activation)
    return _Hidden(x, *reduced, gate, raw_gate, up, raw_up, active, active * up)


def _forward(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """Return (hidden, added): what the down projection takes, and what its experts add to its
    product.

    x: (T, D); gate, up: (T, F); experts, weights: (T, K). Without DoRA on the down projection both
    are summed over the slots with the router's weights, (T, F) and (T, D); with it they are by
    filled slot, (P, F) and (P, D), before its scale. `added` is None where it has no experts.
    """
    lows = low_ranks(block, x.dtype)
    a, down = _input_a(lows), lows["down"]
    per_slot = block.down.has_scale
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    count = int((weights != 0).sum()) if per_slot else len(x)
    hidden, added, done = None, None, 0
    for first, end in blocks(*experts.shape):
        span = slice(first, end)
        rows = sort_rows(experts[span], weights[span], block.num_experts, x.dtype)
        part = block.slice(first, end)
        states = x.new_empty(len(rows.tokens), gate.shape[1])
        adds = None if down is None else x.new_empty(len(rows.tokens), x.shape[1])
        for piece in rows.pieces(gate.shape[1], part.hidden_mask):
            h = _hidden_of(piece, x_low[span], gate[span], up[span], part, lows, a)
            states[piece.span] = h.hidden
            if down is not None:
                low = piece.multiply(piece.zero_(h.hidden), down.a.transpose(1, 2))
                low *= down.factor
                piece.multiply(low, down.b.transpose(1, 2), adds[piece.span])

        def mixed(values: Tensor, rows: Rows = rows) -> Tensor:
            if per_slot:
                return values.index_select(0, rows.position)
            return rows.combine(values, weighted=True)

        made = slice(done, done + (len(rows.pairs) if per_slot else end - first))
        done = made.stop
        hidden = _placed(hidden, made, mixed(states), count)
        if adds is not None:
            added = _placed(added, made, mixed(adds), count)
    return hidden, added


def _placed(whole: Tensor | None, span: slice, values: Tensor, count: int) -> Tensor:
    """Return `values` in the rows `span` of `whole` (count, width), which is made at the first;
    itself where it is all of them."""
    if len(values) == count:
        return values
    if whole is None:
        whole = values.new_empty(count, *values.shape[1:])
    whole[span] = values
    return whole


def _down_backward(
    piece: Piece,
    dhidden: Tensor,
    dadded: Tensor | None,
    h: _Hidden,
    block: FeedForward,
    lows: Lows,
    gradients: Gradients,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the rows' hidden states, and of the router's weights by row (None per
    slot, where they are applied later). Dropped elements of `h.hidden` are zero afterwards."""
    down, per_slot, dweights = lows["down"], block.down.has_scale, None
    by_row = piece.by_pair if per_slot else piece.by_token
    dhidden = by_row(dhidden)
    if not per_slot:
        dweights = (dhidden * h.hidden).sum(dim=-1)
        dhidden *= piece.weights
    if down is None:
        return dhidden, dweights
    dout, hidden = by_row(dadded), piece.zero_(h.hidden)
    low = piece.multiply(hidden, down.a.transpose(1, 2))
    dlow = piece.multiply(dout, down.b)
    factor = down.factor
    if not per_slot:
        dweights = dweights + down.factor * (dlow * low).sum(dim=-1)
        factor = piece.weights * down.factor
    dlow = dlow * factor
    piece.add_outer(gradients.b["down"], dout, low * factor)
    piece.add_outer(gradients.a["down"], dlow, hidden)
    piece.add_kept_product(dhidden, dlow, down.a)
    return dhidden, dweights


def _sides_backward(
    piece: Piece,
    grads: tuple[Tensor, Tensor],
    dx: Tensor,
    h: _Hidden,
    lows: Lows,
    gradients: Gradients,
    a: Tensor | None,
    da: Tensor | None,
) -> None:
    """Run the backward pass of gate and up for a piece's rows.

    grads: of gate and up of the rows, (rows, F) each, here made those of the frozen products. dx:
    (rows, D), gets the gradient of x through the experts. a: as of `_input_a`; da: its gradient,
    added to.
    """
    dlows = []
    sides = (("gate", grads[0], h.raw_gate, h.low_gate), ("up", grads[1], h.raw_up, h.low_up))
    for role, grad, raw, low in sides:
        adapter = lows[role]
        if adapter is None:
            continue
        if adapter.scale is not None:
            piece.add_sums(gradients.magnitude[role], raw.mul_(grad))
            piece.scaled(grad, adapter.scale, grad)
        piece.add_outer(gradients.b[role], grad, low * adapter.factor)
        dlows.append(piece.multiply(grad, adapter.b) * adapter.factor)
    if a is not None:
        dlow = dlows[0] if len(dlows) == 1 else torch.cat(dlows, dim=1)
        piece.add_outer(da, dlow, h.x)
        piece.multiply(dlow, a, dx)


class _GroupedHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, gate, up, weights, experts, *tensors):
        ctx.spec = spec
        ctx.save_for_backward(x, gate, up, weights, experts, *tensors)
        return _forward(x, gate, up, experts, weights, unpack(spec, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, dhidden, dadded):
        with torch.autocast(dhidden.device.type, enabled=False):
            return _gradients(ctx, dhidden, dadded)


def _gradients(ctx, dhidden: Tensor, dadded: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of `_GroupedHidden.forward`'s arguments, in their order."""
    x, gate, up, weights, experts, *tensors = ctx.saved_tensors
    block = unpack(ctx.spec, tensors)
    per_slot, width = block.down.has_scale, gate.shape[1]
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    dgate, dup, dx, dweights = None, None, None, torch.zeros_like(weights)
    lows, gradients, done = low_ranks(block, x.dtype), Gradients(block, x.dtype), 0
    a = _input_a(lows)
    da = None if a is None else torch.zeros_like(a, dtype=gradients.dtype)
    for first, end in blocks(*experts.shape):
        span = slice(first, end)
        rows = sort_rows(experts[span], weights[span], block.num_experts, x.dtype)
        part = block.slice(first, end)
        made = slice(done, done + (len(rows.pairs) if per_slot else end - first))
        done = made.stop
        count = len(rows.tokens)
        row_gate, row_up = x.new_empty(count, width), x.new_empty(count, width)
        row_x, row_weights = x.new_empty(count, x.shape[1]), x.new_empty(count)
        for piece in rows.pieces(width, part.hidden_mask):
            own = piece.span
            h = _hidden_of(piece, x_low[span], gate[span], up[span], part, lows, a)
            part_dadded = None if dadded is None else dadded[made]
            dh, dpairs = _down_backward(piece, dhidden[made], part_dadded, h, part, lows, gradients)
            if dpairs is not None:
                row_weights[own] = dpairs
            sides = row_gate[own], row_up[own]
            torch.mul(dh, h.active, out=sides[1])
            activation_gradient(dh.mul_(h.up), h.gate, block.activation, sides[0])
            _sides_backward(piece, sides, row_x[own], h, lows, gradients, a, da)
        dgate = _placed(dgate, span, rows.combine(row_gate), len(x))
        dup = _placed(dup, span, rows.combine(row_up), len(x))
        if not per_slot:
            dweights[span].view(-1)[rows.pairs] = row_weights[rows.position].to(weights.dtype)
        if a is not None:
            dx_low, mask = rows.combine(row_x), part.x_mask
            dx = _placed(dx, span, dx_low if mask is None else mask.zero(dx_low), len(x))
    if da is not None:
        roles = [role for role in ("gate", "up") if lows[role] is not None]
        sizes = [lows[role].a.shape[1] for role in roles]
        gradients.a.update(zip(roles, da.split(sizes, dim=1), strict=True))
    # Of the down projection's magnitude `scaled_sum` has the gradient.
    return None, dx, dgate, dup, dweights, None, *gradients.flat(block)


def grouped_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """Compute the stage with tokens grouped by expert. It has no gradient for biases of gate and
    up."""
    experts, weights = routing.experts, routing.weights
    spec, tensors = pack(block)
    hidden, added = _GroupedHidden.apply(spec, x, gate, up, weights, experts, *tensors)

    def finish(y: Tensor) -> Tensor:
        y = y if added is None else y + added
        if block.down.has_scale:
            scale = scale_of(block.down.experts, y.dtype)
            y = scaled_sum(y, experts, weights, scale)
        return add_down_bias(y, weights, block)

    return hidden, finish
