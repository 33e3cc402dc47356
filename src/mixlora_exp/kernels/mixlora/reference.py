"""The MixLoRA block by its definition: every expert is a whole feed-forward block.

Slow and plain on purpose: it is what the other kernels are judged against (in float64).
Paper, Section 3.2 and Fig. 3a.
"""

from __future__ import annotations

from torch import Tensor

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.registry import kernel
from mixlora_exp.kernels.shapes import FeedForward, Projection, Routing

__all__ = ["mixlora_reference"]


def _project(x: Tensor, x_low: Tensor, projection: Projection, expert: int) -> Tensor:
    """Compute `W x + s B_e A_e x_low`, with DoRA times `m_e / ||W + s B_e A_e||`, and then the
    bias."""
    y = projection.frozen.linear(x)
    experts = projection.experts
    if experts is not None:
        low = x_low @ experts.a[expert].to(x.dtype).T @ experts.b[expert].to(x.dtype).T
        y = y + experts.scaling * low
        if experts.magnitude is not None:
            assert experts.norm is not None
            y = y * (experts.magnitude[expert] / experts.norm[expert]).to(x.dtype)
    return y if projection.bias is None else y + projection.bias


@kernel("reference", linear="plain", casts=True, per_expert=True)
def mixlora_reference(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """The definition by loops over whole experts, the oracle of the others.

    `y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D).
    """
    y = x.new_zeros(x.shape)
    x_low = drop(x, block.x_mask)
    for expert, tokens, slots in routing.by_expert(block.num_experts):
        inputs = x[tokens], x_low[tokens]
        hidden = activate(_project(*inputs, block.gate, expert), block.activation)
        hidden = hidden * _project(*inputs, block.up, expert)
        hidden_low = drop(hidden, block.hidden_mask, tokens)
        out = _project(hidden, hidden_low, block.down, expert)
        weights = routing.weights[tokens, slots].to(x.dtype)
        y = y.index_add(0, tokens, weights.unsqueeze(-1) * out)
    return y
