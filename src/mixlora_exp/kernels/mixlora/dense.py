"""The exact kernel's stage with the experts stacked to `E R` columns: the form for a GPU.

Products over all experts' columns, of which a slot keeps those of its expert: no sorting, no loop
over experts, no shape that depends on the data and nothing read back to the host, so it can be
captured in a CUDA graph and compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.mixlora.packing import pack, unpack
from mixlora_exp.kernels.mixlora.stage import Finish, add_down_bias
from mixlora_exp.kernels.router_base import is_expert
from mixlora_exp.kernels.shapes import FeedForward, LowRank, Routing, low_ranks

__all__ = ["dense_stage"]


def _columns(low: LowRank) -> Tensor:
    """Return A of all experts, (E R, in)."""
    return low.a.flatten(0, 1)


def _rows(low: LowRank) -> Tensor:
    """B^T of all experts, (E R, out)."""
    return low.b.transpose(1, 2).flatten(0, 1)


def _keep(columns: Tensor, chosen: Tensor) -> Tensor:
    """Return columns (..., E R) with zeros but for the slot's expert. chosen: (..., E) bool."""
    grouped = columns.unflatten(-1, (chosen.shape[-1], -1))
    return torch.where(chosen.unsqueeze(-1), grouped, 0.0).flatten(-2)


def _chosen(experts: Tensor, filled: Tensor, num_experts: int) -> Tensor:
    """Return (T, K, E) bool: each slot's expert; none of an empty slot."""
    return is_expert(experts, num_experts) & filled.unsqueeze(-1)


def _scale(low: LowRank, experts: Tensor, filled: Tensor) -> Tensor:
    """Return DoRA's scale of each slot's expert, (T, ..., out), 0 of an empty slot."""
    # Its gradient is a sum over tokens: in float32 at least.
    wide = low.scale.to(torch.promote_types(low.scale.dtype, torch.float32))
    scale = functional.embedding(experts, wide).to(low.scale.dtype)
    return torch.where(filled.unsqueeze(-1), scale, 0.0)


def _hidden_states(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """Return (hidden, columns): what the down projection takes, and its experts' `A h`.

    x: (T, D); gate, up: (T, F), the frozen products; experts, weights: (T, K). Without DoRA on the
    down projection both are summed over the slots with the router's weights, (T, F) and (T, E R),
    since W2 is linear and shared; with it they are per slot, (T, K, F) and (T, K, E R).
    """
    lows = low_ranks(block, x.dtype)
    filled = weights.detach() != 0
    chosen = _chosen(experts, filled, block.num_experts)
    # An empty slot's weight has no gradient.
    weights = torch.where(filled, weights, 0.0).to(x.dtype)
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    per_slot = block.down.has_scale
    reduced = {
        role: functional.linear(x_low, _columns(lows[role]))
        for role in ("gate", "up")
        if lows[role] is not None
    }
    hidden, columns = [], []
    for k in range(experts.shape[1]):
        sides = []
        for role, frozen in (("gate", gate), ("up", up)):
            low, bias = lows[role], block.projections[role].bias
            if low is not None:
                kept = _keep(reduced[role], chosen[:, k])
                frozen = torch.addmm(frozen, kept, _rows(low), alpha=low.factor)
                if low.scale is not None:
                    frozen = frozen * _scale(low, experts[:, k], filled[:, k])
            sides.append(frozen if bias is None else frozen + bias)
        state = activate(sides[0], block.activation) * sides[1]
        weight = weights[:, k : k + 1]
        hidden.append(state if per_slot else weight * state)
        if lows["down"] is not None:
            state = state if block.hidden_mask is None else block.hidden_mask.zero(state)
            kept = _keep(functional.linear(state, _columns(lows["down"])), chosen[:, k])
            columns.append(kept if per_slot else weight * kept)
    if per_slot:
        return torch.stack(hidden, dim=1), torch.stack(columns, dim=1)
    return sum(hidden), sum(columns) if columns else None


class _Recomputed(torch.autograd.Function):
    """`_hidden_states`, computed again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx, spec, x, gate, up, experts, weights, *tensors):
        ctx.spec = spec
        ctx.save_for_backward(x, gate, up, experts, weights, *tensors)
        return _hidden_states(x, gate, up, experts, weights, unpack(spec, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:]
        inputs = [
            tensor if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        device = ctx.saved_tensors[0].device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            x, gate, up, experts, weights, *tensors = inputs
            block = unpack(ctx.spec, tensors)
            made = _hidden_states(x, gate, up, experts, weights, block)
            # Where few parameters are trained, an output may depend on none of them, or both.
            pairs = [
                (m, g)
                for m, g in zip(made, grads, strict=True)
                if m is not None and m.requires_grad
            ]
            wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
            found = iter([None] * len(wanted))
            if pairs:
                outputs, upstream = zip(*pairs, strict=True)
                found = iter(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def dense_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """Compute the stage for all experts' columns at once; the backward pass has only the inputs
    saved."""
    experts, weights = routing.experts, routing.weights
    inputs = (x, gate, up, experts, weights)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        # The compiler decides by itself what to keep and what to compute again.
        hidden, columns = _hidden_states(*inputs, block)
    else:
        spec, tensors = pack(block)
        hidden, columns = _Recomputed.apply(spec, *inputs, *tensors)

    def finish(y: Tensor) -> Tensor:
        y = y.view(*hidden.shape[:-1], y.shape[-1])
        low = low_ranks(block, y.dtype)["down"]
        if low is not None:
            y = y + low.factor * functional.linear(columns, _rows(low).T)
            if low.scale is not None:
                shares = torch.where(routing.filled, weights, 0.0).to(y.dtype)
                y = y * _scale(low, experts, routing.filled)
                y = (shares.unsqueeze(-1) * y).sum(dim=1)
        return add_down_bias(y, weights, block)

    return hidden.flatten(0, -2), finish
