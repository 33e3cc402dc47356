"""MixLoRA as E whole feed-forward blocks whose projections run as PEFT's stock LoRA and DoRA do.

The baseline without any sharing (paper, Fig. 3a) in PEFT's own terms: every expert draws its own
dropout per projection; adapters compute in their own dtype; DoRA forms `W + s B A` in each forward
pass for its norm and, when dropout is on, runs a second frozen product on the dropped input, which
its scale acts on. The other kernels drop the low-rank branch's input alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.registry import BlockSizes, kernel
from mixlora_exp.kernels.shapes import FeedForward, Routing

__all__ = ["mixlora_peft"]


def _project(
    x: Tensor, role: str, expert: int, tokens: Tensor, block: FeedForward, p: float
) -> Tensor:
    """Return one projection of an expert for its tokens, (rows, in) to (rows, out) in the dtype of
    x."""
    projection = block.projections[role]
    frozen, experts = projection.frozen, projection.experts
    base = frozen.linear(x)
    shift = 0.0 if projection.bias is None else projection.bias
    if experts is None:
        return (base + shift).to(x.dtype)
    a, b, scaling = experts.a[expert], experts.b[expert], experts.scaling
    key, shape = block.dropout_key, (x.shape[0], x.shape[1])
    x = x.to(a.dtype)
    if key is None:
        x = functional.dropout(x, p)
    else:
        x = drop(x, key.mask(f"{role}/{expert}", shape, p, x.device, tokens))
    low = scaling * functional.linear(functional.linear(x, a), b)
    if experts.magnitude is None:
        return (base + low + shift).to(base.dtype)
    with torch.no_grad():
        norm = torch.linalg.norm(frozen.weight().to(a.dtype) + scaling * (b @ a), dim=1)
    scale = experts.magnitude[expert] / norm
    on_dropped = frozen.linear(x.to(base.dtype)) if p else base
    return (base + (scale - 1) * on_dropped + scale * low + shift).to(base.dtype)


def _saved(sizes: BlockSizes) -> float:
    """Adapters run in float32, without autocast, on a copy of the input each; see
    `registry.Kernel`."""
    d, f, rank, width = sizes.d, sizes.f, sizes.rank, sizes.width
    if width == 4:
        numbers = width * (4 * f + (4 if sizes.dropout else 3) * d + 3 * rank)
    else:
        numbers = 4 * (2 * d + f + 3 * rank) + width * (2 * d + 3 * f)
    masks = 2 * d + f if sizes.dropout else 0
    return sizes.slots * (numbers + (width + 4) * sizes.scaled + masks)


@kernel("peft", linear="peft", draws_masks=True, casts=True, per_expert=True, saved=_saved)
def mixlora_peft(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """Whole experts, whose projections run as PEFT's stock LoRA and DoRA do.

    `y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D).
    """
    y, p = x.new_zeros(x.shape), block.dropout
    for expert, tokens, slots in routing.by_expert(block.num_experts):
        rows = x[tokens]
        hidden = activate(_project(rows, "gate", expert, tokens, block, p), block.activation)
        hidden = hidden * _project(rows, "up", expert, tokens, block, p)
        out = _project(hidden, "down", expert, tokens, block, p)
        weights = routing.weights[tokens, slots].to(x.dtype)
        y = y.index_add(0, tokens, weights.unsqueeze(-1) * out)
    return y
