"""MixLoRA with gate and up shared, down once per expert (paper, Section 3.3 (I), Algorithm 1).

What the official package calls its efficient operator. Kept because the paper's Tables 6 and 7
compare against it; `exact` computes the same with W2 once per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.mixlora.stage import Finish, run_stage
from mixlora_exp.kernels.registry import BlockSizes, kernel, saved_by_operations
from mixlora_exp.kernels.shapes import FeedForward, Projection, Routing

__all__ = ["mixlora_shared", "shared_stage"]


def _adapt(y: Tensor, x_low: Tensor, projection: Projection, expert: int) -> Tensor:
    """Return the frozen product `y` of some rows, made into the expert's: low-rank term, DoRA's
    scale, bias."""
    experts = projection.experts
    if experts is not None:
        low = functional.linear(x_low, experts.a[expert].to(y.dtype))
        y = y + experts.scaling * functional.linear(low, experts.b[expert].to(y.dtype))
        if experts.magnitude is not None:
            assert experts.norm is not None
            y = y * (experts.magnitude[expert] / experts.norm[expert]).to(y.dtype)
    return y if projection.bias is None else y + projection.bias


def shared_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """Compute the paper's Algorithm 1 as a stage: the down projection per slot, expert after
    expert."""
    x_low = drop(x, block.x_mask)
    chosen, hiddens = [], []
    for expert in range(block.num_experts):
        tokens, slots = routing.slots_of(expert)
        sides = [
            _adapt(frozen[tokens], x_low[tokens], projection, expert)
            for frozen, projection in ((gate, block.gate), (up, block.up))
        ]
        chosen.append((tokens, routing.weights[tokens, slots]))
        hiddens.append(activate(sides[0], block.activation) * sides[1])

    def finish(y: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        parts = y.split([len(hidden) for hidden in hiddens])
        for expert, ((tokens, weights), part) in enumerate(zip(chosen, parts, strict=True)):
            hidden_low = drop(hiddens[expert], block.hidden_mask, tokens)
            part = _adapt(part, hidden_low, block.down, expert)
            out = out.index_add(0, tokens, weights.to(part.dtype).unsqueeze(-1) * part)
        return out

    return torch.cat(hiddens), finish


def _saved(sizes: BlockSizes) -> float:
    """The rows of x once more for the low-rank branch; see `registry.Kernel`."""
    return saved_by_operations(sizes) + sizes.slots * sizes.width * sizes.d


@kernel("shared", stage=shared_stage, casts=True, saved=_saved)
def mixlora_shared(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """The paper's Algorithm 1: gate and up once per token, down once per slot.

    `y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D).
    """
    return run_stage(shared_stage, x, routing, block)
