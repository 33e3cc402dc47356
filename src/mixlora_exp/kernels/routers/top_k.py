"""The paper's router: softmax over all experts, the K most probable, their weights normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora_exp.kernels.dropout import DropoutKey
from mixlora_exp.kernels.router_base import router, router_logits
from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.softmax_router import SoftmaxRouter
from mixlora_exp.kernels.top_k_routing import most_probable, route

__all__ = ["TopK", "route"]


@router("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(SoftmaxRouter):
    """K experts per token, the most probable ones, with the load-balance loss of Eq. (8).

    precision: `float32`, or `bfloat16`: the router's product rounds to it, as in models of bf16
    whose router is a layer like any other; only to show what that costs. Kernels of a GPU may
    decide in one launch, unless an option of `SoftmaxRouter` is set.
    """

    precision: str = "float32"

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute G x (T, E) in `precision`."""
        return router_logits(x, weight, torch.bfloat16 if self.precision == "bfloat16" else None)

    def choose(
        self,
        logits: Tensor,
        probabilities: Tensor,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Routing:
        """Return the K most probable experts of each row."""
        return most_probable(logits, probabilities, self.top_k)

    def route_masked(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
        *,
        training: bool = False,
        fused: bool = False,
        key: DropoutKey | None = None,
    ) -> Routing:
        """Return the decision for rows x (T, in), with `fused` in one launch of a Triton kernel,
        unless an option differs from its default."""
        options = (self.precision, self.temperature, self.jitter, self.z_loss, self.normalise)
        if not fused or options != ("float32", 1.0, 0.0, 0.0, True):
            return super().route_masked(x, weights, mask, training=training, key=key)
        # Not before it is used: Triton is missing on many machines.
        from mixlora_exp.kernels.triton.router import route_triton

        return route_triton(x, weights[""], self.top_k, mask)

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        """Return `SoftmaxRouter.statistics`, or `report`, the sums that the fused router has made
        already."""
        if "report" in routing.extra:
            return {"report": routing.extra["report"]}
        return super().statistics(routing, mask)

    def gathered(self, each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the statistics of all modules; from reports of the fused router, their sums made
        F, P and counts."""
        if not all("report" in statistics for statistics in each):
            return super().gathered(each)
        # Of all modules at once: their programs' counts and sums.
        sums = super().gathered(each)["report"].sum(dim=1)
        first, chosen = sums.detach()[:, 0], sums.detach()[:, 1]
        tokens = first.sum(dim=-1, keepdim=True).clamp(min=1)
        fractions = (chosen if self.loss == "topk" else first) / tokens
        return {"fractions": fractions, "probabilities": sums[:, 2] / tokens, "counts": chosen}
