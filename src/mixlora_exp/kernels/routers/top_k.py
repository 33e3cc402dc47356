"""The paper's router: softmax over all experts, the K most probable, their weights normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora_exp.kernels.routing import Router, router, router_logits
from mixlora_exp.kernels.shapes import Routing

__all__ = ["TopK", "route"]


def route(x: Tensor, weight: Tensor, top_k: int, dtype: torch.dtype | None = None) -> Routing:
    """softmax(x weight^T), top-k, normalised over the k (paper, Section 3.2).

    x: (T, D); weight: (E, D), no bias; dtype: of the product, see `router_logits`. Of equal logits
    the lowest expert comes first, everywhere: `topk` promises no order.
    """
    logits = router_logits(x, weight, dtype)
    probabilities = logits.softmax(dim=-1)
    experts = (
        logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    )
    chosen = probabilities.gather(1, experts)
    return Routing(logits, probabilities, experts, chosen / chosen.sum(dim=-1, keepdim=True))


@router("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """K experts per token, the most probable ones, with the load-balance loss of Eq. (8).

    precision: `float32`, or `bfloat16`: the router's product rounds to it, as in models of bf16
    whose router is a layer like any other; only to show what that costs.
    """

    precision: str = "float32"

    def route(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        *,
        training: bool = False,
        fused: bool = False,
    ) -> Routing:
        return self.route_masked(x, weights, None, training=training, fused=fused)

    def route_masked(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
        *,
        training: bool = False,
        fused: bool = False,
    ) -> Routing:
        if self.precision == "bfloat16":
            return route(x, weights[""], self.top_k, torch.bfloat16)
        if not fused:
            return route(x, weights[""], self.top_k)
        # One launch. Not before it is used: Triton is missing on many machines.
        from mixlora_exp.kernels.triton.router import route_triton

        return route_triton(x, weights[""], self.top_k, mask)

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        if "report" in routing.extra:
            return {"report": routing.extra["report"]}
        return super().statistics(routing, mask)

    def gathered(self, each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if not all("report" in statistics for statistics in each):
            return super().gathered(each)
        # Of all modules at once: their programs' counts and sums.
        sums = super().gathered(each)["report"].sum(dim=1)
        first, chosen = sums.detach()[:, 0], sums.detach()[:, 1]
        tokens = first.sum(dim=-1, keepdim=True).clamp(min=1)
        fractions = (chosen if self.loss == "topk" else first) / tokens
        return {"fractions": fractions, "probabilities": sums[:, 2] / tokens, "counts": chosen}
