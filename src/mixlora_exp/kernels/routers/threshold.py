"""AdaMoLE's router: the experts above a threshold that is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixlora_exp.kernels.router_base import ranked, router, router_logits
from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.softmax_router import SoftmaxRouter, varying_fractions

__all__ = ["Threshold"]


@router("threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold(SoftmaxRouter):
    """The experts whose probability is above a threshold of the row, weighted by what is above it:

        t = t_max sigmoid(v x + c),   a_e = p_e - t,   w_e = max(a_e, 0) / sum_i max(a_i, 0)

    v (1, in) is stored as `lora_router_threshold`, c (1,), 0 at first, as
    `lora_router_threshold_bias`. `top_k` is not read.

    t_max: None is 1/E, up to which a row has at least one expert. Above that a row may have none:
    a feed-forward block then computes it without experts. Loss: `varying_fractions`; shifted_loss:
    with the mean of a_e as P_e, as in AdaMoLE's code, and not of p_e; it may then be negative.
    """

    roles: ClassVar[Mapping[str, str]] = {"": "A", "threshold": "A", "threshold_bias": "B"}
    reads_top_k = False
    varies = True
    t_max: float | None = None
    shifted_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.t_max is None or 0 < self.t_max <= 1, "t_max", "must be in (0, 1]")

    @property
    def slots(self) -> int:
        """E: all probabilities may be above the threshold."""
        return self.num_experts

    @property
    def base_share(self) -> float:
        """1 where t_max leaves it possible that a row has no expert: all may have none."""
        return float(self._may_have_none)

    @property
    def _may_have_none(self) -> bool:
        return self.t_max is not None and self.t_max > 1 / self.num_experts

    def initial(self, width: int) -> dict[str, Tensor]:
        """Return new weights of the logits and of the threshold, whose bias is 0."""
        threshold = torch.randn(1, width) * self.init_std
        return {
            **super().initial(width),
            "threshold": threshold,
            "threshold_bias": torch.zeros(1),
        }

    def choose(
        self,
        logits: Tensor,
        probabilities: Tensor,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Routing:
        """Return all experts with weight max(p_e - t, 0); where t_max > 1/E, a row with no expert
        above it has `base` 1."""
        highest = 1 / self.num_experts if self.t_max is None else self.t_max
        level = router_logits(x, weights["threshold"]) + weights["threshold_bias"]
        above = probabilities - highest * level.sigmoid()
        experts = ranked(logits)
        kept = above.gather(1, experts).clamp(min=0)
        base = (kept == 0).all(dim=-1).to(kept.dtype) if self._may_have_none else None
        return Routing(logits, probabilities, experts, kept, {"above": above}, base=base)

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        """Return `varying_fractions`; with `shifted_loss` P_e is the mean of p_e - t."""
        found = varying_fractions(super().statistics(routing, mask), self.loss)
        if self.shifted_loss:
            found["probabilities"] = self.mean_of_real(routing.extra["above"], mask)
        return found
