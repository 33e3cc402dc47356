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
from mixlora_exp.kernels.shapes import FeedForward, Projection, Routing

__all__ = ["dropped", "mixlora_stock", "stock_linear"]


def dropped(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """`x` after dropout, drawn from `generator` or else torch's default one."""
    if generator is None or p == 0.0:
        return functional.dropout(x, p)
    kept = torch.empty_like(x).bernoulli_(1.0 - p, generator=generator)
    return x * kept.mul_(1.0 / (1.0 - p))


def stock_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float,
    magnitude: Tensor | None = None,
    generator: torch.Generator | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """PEFT's LoRA or DoRA of one projection. x: (T, in); a: (R, in); b: (out, R);
    magnitude, bias: (out,); returns (T, out) in the dtype of x."""
    base = functional.linear(x, weight)
    shift = 0.0 if bias is None else bias
    x = dropped(x.to(a.dtype), dropout, generator)
    low = scaling * functional.linear(functional.linear(x, a), b)
    if magnitude is None:
        return (base + low + shift).to(base.dtype)
    delta = (b @ a).detach()
    with torch.no_grad():
        norm = torch.linalg.norm(weight.to(a.dtype) + scaling * delta, dim=1)
    scale = magnitude / norm
    on_dropped = functional.linear(x, weight.to(x.dtype)) if dropout else base
    return (base + (scale - 1) * on_dropped + scale * low + shift).to(base.dtype)


def _project(x: Tensor, projection: Projection, expert: int, block: FeedForward) -> Tensor:
    experts = projection.experts
    if experts is None:
        return functional.linear(x, projection.weight, projection.bias)
    magnitude = None if experts.magnitude is None else experts.magnitude[expert]
    a, b = experts.a[expert], experts.b[expert]
    return stock_linear(
        x,
        projection.weight,
        a,
        b,
        experts.scaling,
        block.dropout,
        magnitude,
        block.generator,
        projection.bias,
    )


def mixlora_stock(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D)."""
    y = x.new_zeros(x.shape)
    for expert in range(routing.probabilities.shape[-1]):
        tokens, slots = (routing.experts == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        rows = x[tokens]
        hidden = activate(_project(rows, block.gate, expert, block), block.activation)
        hidden = hidden * _project(rows, block.up, expert, block)
        out = _project(hidden, block.down, expert, block)
        weights = routing.weights[tokens, slots].to(x.dtype)
        y = y.index_add(0, tokens, weights.unsqueeze(-1) * out)
    return y
