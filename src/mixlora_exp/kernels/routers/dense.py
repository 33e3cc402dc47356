"""A soft mixture: every row gets all experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mixlora_exp.kernels.router_base import ranked, router
from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.softmax_router import SoftmaxRouter

__all__ = ["Dense"]


@router("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(SoftmaxRouter):
    """All E experts, weighted by their probabilities; `top_k` is not read.

    Every expert has every row, so F_e of the load-balance loss is the expert's mean weight P_e
    itself: E sum_e P_e^2 = 1 + CV^2, with the coefficient of variation of the experts' mean
    weights. 1 at balance, E at worst; `router_loss` is not read.
    """

    reads_top_k = False
    normalise: bool = False

    @property
    def slots(self) -> int:
        """E: every row gets all experts."""
        return self.num_experts

    def choose(
        self,
        logits: Tensor,
        probabilities: Tensor,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Routing:
        """Return all experts, the most probable first, with their probabilities as weights."""
        experts = ranked(logits)
        return Routing(logits, probabilities, experts, probabilities.gather(1, experts))

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        """Return `SoftmaxRouter.statistics` with F_e = P_e, so that the loss is E sum_e P_e^2."""
        found = super().statistics(routing, mask)
        return {**found, "fractions": found["probabilities"]}
