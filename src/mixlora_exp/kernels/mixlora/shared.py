"""MixLoRA with gate and up shared, down once per expert (paper, Section 3.3 (I), Algorithm 1).

What the official package calls its efficient operator. Kept because the paper's Tables 6 and 7
compare against it; `exact` computes the same with W2 once per token.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.shapes import FeedForward, Projection, Routing

__all__ = ["adapt", "mixlora_shared"]


def adapt(y: Tensor, x_low: Tensor, projection: Projection, expert: int) -> Tensor:
    """The frozen product `y` of some rows, made into the expert's: low-rank term, DoRA's scale,
    bias."""
    experts = projection.experts
    if experts is not None:
        low = functional.linear(x_low, experts.a[expert].to(y.dtype))
        y = y + experts.scaling * functional.linear(low, experts.b[expert].to(y.dtype))
        if experts.magnitude is not None:
            assert experts.norm is not None
            y = y * (experts.magnitude[expert] / experts.norm[expert]).to(y.dtype)
    return y if projection.bias is None else y + projection.bias


def mixlora_shared(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D)."""
    gate = functional.linear(x, block.gate.weight)
    up = functional.linear(x, block.up.weight)
    x_low = drop(x, block.x_mask)
    y = x.new_zeros(x.shape)
    for expert in range(routing.probabilities.shape[-1]):
        tokens, slots = (routing.experts == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        hidden = activate(adapt(gate[tokens], x_low[tokens], block.gate, expert), block.activation)
        hidden = hidden * adapt(up[tokens], x_low[tokens], block.up, expert)
        hidden_low = drop(hidden, block.hidden_mask, tokens)
        out = adapt(functional.linear(hidden, block.down.weight), hidden_low, block.down, expert)
        weights = routing.weights[tokens, slots].to(x.dtype)
        y = y.index_add(0, tokens, weights.unsqueeze(-1) * out)
    return y
