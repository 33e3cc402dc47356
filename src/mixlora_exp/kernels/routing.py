"""Top-k router and the load-balance loss (paper, Eq. (8) and (9))."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.shapes import Routing

__all__ = ["route", "route_bfloat16", "router_fractions", "router_loss"]


def route(x: Tensor, router: Tensor, top_k: int) -> Routing:
    """Choose `top_k` experts per token: softmax(x router^T), top-k, normalised over the k.

    x: (T, D); router: (E, D), no bias. Runs in float32 (float64 for float64 input), since near
    ties decide which expert a token gets.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return _choose(functional.linear(x.to(dtype), router.to(dtype)), top_k)


def _choose(logits: Tensor, top_k: int) -> Routing:
    probabilities = logits.softmax(dim=-1)
    chosen, experts = probabilities.topk(top_k, dim=-1)
    return Routing(logits, probabilities, experts, chosen / chosen.sum(dim=-1, keepdim=True))


def route_bfloat16(x: Tensor, router: Tensor, top_k: int) -> Routing:
    """`route` with the router's product in bf16, as models of bf16 run whose router is a layer like
    any other; only to show what that costs."""
    with torch.autocast(x.device.type, enabled=False):
        logits = functional.linear(x.bfloat16(), router.bfloat16())
        return _choose(logits.float(), top_k)


def router_fractions(
    routing: Routing, mask: Tensor | None, *, count_all: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """F, P of Eq. (9) and the number of tokens per expert, padding left out.

    mask: (T,), true for real tokens, or None. F (E,) is the fraction of tokens whose arg-max
    expert is i or, with `count_all`, of those that have i among their K (then F sums to K, as in
    the official implementation). P (E,) is the mean router probability. The third result (E,)
    counts the tokens that were sent to each expert, whatever F counts.
    """
    num_experts = routing.probabilities.shape[-1]
    chosen = functional.one_hot(routing.experts, num_experts).to(routing.probabilities.dtype)
    probabilities = routing.probabilities
    if mask is not None:
        keep = mask.to(probabilities.dtype).unsqueeze(-1)
        chosen = chosen * keep.unsqueeze(-1)
        # `where` and not a product: a padding row may hold NaN, and 0 * NaN is NaN.
        probabilities = torch.where(mask.unsqueeze(-1), probabilities, 0.0)
        tokens = keep.sum().clamp(min=1)
    else:
        tokens = float(probabilities.shape[0])
    counts = chosen.sum(dim=(0, 1))
    fraction = (counts if count_all else chosen[:, 0].sum(dim=0)) / tokens
    return fraction, probabilities.sum(dim=0) / tokens, counts


def router_loss(fractions: Tensor, probabilities: Tensor, *, pooled: bool) -> Tensor:
    """Eq. (8) without its coefficient: `E * sum_i F_i P_i`.

    fractions, probabilities: (layers, E). Computed per layer and averaged or, with `pooled`, from
    the statistics over the tokens of all layers together (each layer sees the same tokens, so
    pooled statistics are means over layers). 1 at perfect balance when F counts the arg-max
    expert, K when it counts all chosen ones.
    """
    if pooled:
        fractions, probabilities = fractions.mean(dim=0), probabilities.mean(dim=0)
    return fractions.shape[-1] * (fractions * probabilities).sum(dim=-1).mean()
