"""The smallest set of experts whose probability reaches p: more for a row that is unsure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora_exp.kernels.router_base import ranked, router
from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.softmax_router import SoftmaxRouter, real_counts, varying_fractions

__all__ = ["TopP"]


@router("top_p")
@dataclass(frozen=True, kw_only=True)
class TopP(SoftmaxRouter):
    """The most probable experts, one after another, until their probabilities add up to p.

    limit: at most so many of them, 0: up to E; `top_k` is not read. Loss: `varying_fractions`.

    As moe-peft does: exceed: until they add up to more than p; divisor above 0: the probabilities
    are divided by it before they are added up, and so are the weights (its temperature);
    padding_in_loss: padding counts in the loss.
    """

    reads_top_k = False
    varies = True
    p: float = 0.8
    limit: int = 0
    exceed: bool = False
    divisor: float = 0.0
    padding_in_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.p <= 1, "p", "must be in (0, 1]")
        self.require(self.divisor >= 0, "divisor", "must be >= 0")
        rule = f"must be in [0, num_experts={self.num_experts}]"
        self.require(0 <= self.limit <= self.num_experts, "limit", rule)

    @property
    def slots(self) -> int:
        """`limit`, or E without one."""
        return self.limit or self.num_experts

    def choose(
        self,
        logits: Tensor,
        probabilities: Tensor,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Routing:
        """Return the most probable experts, with weight 0 from where those before add up to p."""
        experts = ranked(logits)[:, : self.slots]
        found = probabilities.gather(1, experts)
        if self.divisor:
            found = found / self.divisor
        # Of the experts before each: the first stays in any case.
        before = found.detach().cumsum(dim=-1)[:, :-1]
        before = torch.cat([torch.zeros_like(found[:, :1]), before], dim=-1)
        wanted = before <= self.p if self.exceed else before < self.p
        return Routing(logits, probabilities, experts, torch.where(wanted, found, 0.0))

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        """Return `varying_fractions`, with padding in them if `padding_in_loss`."""
        seen = None if self.padding_in_loss else mask
        found = varying_fractions(super().statistics(routing, seen), self.loss)
        return real_counts(found, routing, mask) if self.padding_in_loss else found
