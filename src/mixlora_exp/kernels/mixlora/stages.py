"""The block in two stages around its down projection, for several adapters on one base.

The frozen products run once over the rows of all adapters; a stage is what one adapter does to its
own rows between them. It takes x (T, D) and the frozen products gate and up (T, F) of these rows,
and returns the rows (R, F) that the down projection takes and a function from their products
(R, D) to the adapter's outputs (T, D). R is T, or T K where the down projection is per slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.mixlora import dense
from mixlora_exp.kernels.mixlora.bias import add_down_bias
from mixlora_exp.kernels.mixlora.exact import grouped_is_faster, recomputed_hidden_states
from mixlora_exp.kernels.mixlora.grouped_stage import grouped_hidden, scaled_sum
from mixlora_exp.kernels.mixlora.shared import adapt
from mixlora_exp.kernels.shapes import FeedForward, Routing, low_ranks

__all__ = ["STAGES", "Finish", "Stage", "dense_stage", "grouped_stage", "shared_stage", "staged"]

Finish = Callable[[Tensor], Tensor]
Stage = Callable[[Tensor, Tensor, Tensor, Routing, FeedForward], tuple[Tensor, Finish]]


def grouped_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """The exact kernel, tokens grouped by expert."""
    biases = [p.bias for p in (block.gate, block.up) if p.bias is not None]
    if len(x) == 0 or any(bias.requires_grad for bias in biases):
        # Its own backward pass has no gradient for biases.
        return dense_stage(x, gate, up, routing, block)
    experts, weights = routing.experts, routing.weights
    hidden, added = grouped_hidden(x, gate, up, experts, weights, block)

    def finish(y: Tensor) -> Tensor:
        y = y.view(*hidden.shape[:-1], y.shape[-1])
        y = y if added is None else y + added
        if block.down.has_scale:
            y = scaled_sum(y, experts, weights, low_ranks(block, y.dtype)["down"].scale)
        return add_down_bias(y, weights, block)

    return hidden.flatten(0, -2), finish


def dense_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """The exact kernel over all experts' columns at once."""
    experts, weights = routing.experts, routing.weights
    hidden, columns = recomputed_hidden_states(x, gate, up, experts, weights, block)
    return hidden.flatten(0, -2), lambda y: dense.finish(
        y.view(*hidden.shape[:-1], y.shape[-1]), columns, experts, weights, block
    )


def exact_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """The exact kernel, in the form that is faster for this device and shape."""
    stage = grouped_stage if grouped_is_faster(x, block) else dense_stage
    return stage(x, gate, up, routing, block)


def shared_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """The paper's Algorithm 1: the down projection per slot, expert after expert."""
    x_low = drop(x, block.x_mask)
    chosen, hiddens = [], []
    for expert in range(block.num_experts):
        tokens, slots = (routing.experts == expert).nonzero(as_tuple=True)
        sides = [
            adapt(frozen[tokens], x_low[tokens], projection, expert)
            for frozen, projection in ((gate, block.gate), (up, block.up))
        ]
        chosen.append((tokens, routing.weights[tokens, slots]))
        hiddens.append(activate(sides[0], block.activation) * sides[1])

    def finish(y: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        parts = y.split([len(hidden) for hidden in hiddens])
        for expert, ((tokens, weights), part) in enumerate(zip(chosen, parts, strict=True)):
            hidden_low = drop(hiddens[expert], block.hidden_mask, tokens)
            part = adapt(part, hidden_low, block.down, expert)
            out = out.index_add(0, tokens, weights.to(part.dtype).unsqueeze(-1) * part)
        return out

    return torch.cat(hiddens), finish


STAGES: dict[str, Stage] = {
    "exact": exact_stage,
    "shared": shared_stage,
    # Its fused kernels hold the frozen products inside; the dense form around them is theirs.
    "triton": exact_stage,
}
"""By kernel. `reference` and `peft` are whole experts by definition and share nothing."""


def staged(stage: Stage) -> Callable[[Tensor, Routing, FeedForward], Tensor]:
    """The whole block of one adapter by a stage: a kernel like the others."""

    def kernel(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
        gate = functional.linear(x, block.gate.weight)
        up = functional.linear(x, block.up.weight)
        hidden, finish = stage(x, gate, up, routing, block)
        return finish(functional.linear(hidden, block.down.weight))

    return kernel
