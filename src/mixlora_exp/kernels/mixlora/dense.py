"""The exact kernel with the experts stacked to `E R` columns: the form for a GPU.

Products over all experts' columns, of which a slot keeps those of its expert: no sorting, no loop
over experts, no shape that depends on the data and nothing read back to the host, so it can be
captured in a CUDA graph and compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.mixlora.bias import add_down_bias
from mixlora_exp.kernels.shapes import FeedForward, LowRank, low_ranks

__all__ = ["combine", "finish", "hidden_states"]


def _isolate(low: LowRank, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (E R, in) and B (out, E R) with the experts zero that hold NaN or infinity, and (T, K, 1)
    what such an expert adds to the columns of its tokens: NaN, else 0.

    A slot's zero columns meet every expert's B, and 0 * NaN would spread to all tokens.
    """
    sums = low.a.detach().sum(dim=(1, 2), dtype=torch.float32)
    sums = sums + low.b.detach().sum(dim=(1, 2), dtype=torch.float32)
    broken = ~torch.isfinite(sums)
    stain = torch.where(broken, float("nan"), 0.0).to(low.a.dtype)
    a = torch.where(broken.view(-1, 1, 1), 0.0, low.a).flatten(0, 1)
    b = torch.where(broken.view(-1, 1, 1), 0.0, low.b).transpose(0, 1).flatten(1, 2)
    return a, b, torch.where(chosen, stain, 0.0).sum(dim=-1, keepdim=True)


def _keep(columns: Tensor, chosen: Tensor, stain: Tensor) -> Tensor:
    """Of the columns (T, E R) those of the slot's expert. chosen: (T, E); stain: (T, 1)."""
    grouped = columns.unflatten(-1, (chosen.shape[-1], -1))
    return torch.where(chosen.unsqueeze(-1), grouped, 0.0).flatten(-2) + stain


def _adapt(frozen: Tensor, columns: Tensor, b: Tensor, low: LowRank, experts: Tensor) -> Tensor:
    """A slot's output. frozen: (T, out); columns: (T, E R); b: (out, E R); experts: (T,)."""
    y = torch.addmm(frozen, columns, b.T, alpha=low.factor)
    return y if low.scale is None else y * functional.embedding(experts, low.scale)


def hidden_states(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """(hidden, columns): what the down projection takes, and its experts' `A h`.

    x: (T, D); gate, up: (T, F), the frozen products; experts, weights: (T, K). Without DoRA on the
    down projection both are summed over the slots with the router's weights, (T, F) and (T, E R),
    since W2 is linear and shared; with it they are per slot, (T, K, F) and (T, K, E R).
    """
    lows = low_ranks(block, x.dtype)
    chosen = functional.one_hot(experts, block.num_experts).bool()
    x_low = x if block.x_mask is None else block.x_mask.zero(x)
    stacked = {role: _isolate(low, chosen) for role, low in lows.items() if low is not None}
    columns = {
        role: functional.linear(x_low, stacked[role][0])
        for role in ("gate", "up")
        if role in stacked
    }
    per_slot = block.down.has_scale
    hidden, reduced = [], []
    for k in range(experts.shape[1]):
        sides = []
        for role, frozen in (("gate", gate), ("up", up)):
            if role in stacked:
                _, b, stain = stacked[role]
                kept = _keep(columns[role], chosen[:, k], stain[:, k])
                frozen = _adapt(frozen, kept, b, lows[role], experts[:, k])
            bias = block.projections[role].bias
            sides.append(frozen if bias is None else frozen + bias)
        state = activate(sides[0], block.activation) * sides[1]
        weight = weights[:, k : k + 1].to(x.dtype)
        hidden.append(state if per_slot else weight * state)
        if "down" in stacked:
            a, _, stain = stacked["down"]
            state = state if block.hidden_mask is None else block.hidden_mask.zero(state)
            kept = _keep(functional.linear(state, a), chosen[:, k], stain[:, k])
            reduced.append(kept if per_slot else weight * kept)
    if per_slot:
        return torch.stack(hidden, dim=1), torch.stack(reduced, dim=1)
    return sum(hidden), sum(reduced) if reduced else None


def combine(
    hidden: Tensor, columns: Tensor | None, experts: Tensor, weights: Tensor, block: FeedForward
) -> Tensor:
    """The down projection of `hidden_states`' results, (T, D)."""
    y = functional.linear(hidden, block.down.weight)
    return finish(y, columns, experts, weights, block)


def finish(
    y: Tensor, columns: Tensor | None, experts: Tensor, weights: Tensor, block: FeedForward
) -> Tensor:
    """The experts' part of the down projection, and its bias, added to its frozen product, (T, D).

    y: (T, D), or per slot (T, K, D) where `hidden_states` is per slot."""
    low = low_ranks(block, y.dtype)["down"]
    if low is not None and columns is not None:
        _, b, _ = _isolate(low, functional.one_hot(experts, block.num_experts).bool())
        y = y + low.factor * functional.linear(columns, b)
        if low.scale is not None:
            y = y * functional.embedding(experts, low.scale)
            y = (weights.to(y.dtype).unsqueeze(-1) * y).sum(dim=1)
    return add_down_bias(y, weights, block)
