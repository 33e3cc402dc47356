"""A control: no router at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora_exp.kernels.router_base import Router, router
from mixlora_exp.kernels.shapes import Routing

__all__ = ["Uniform"]


@router("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Router):
    """All E experts of every row with the weight 1/E, without weights of its own; its loss is 0.
    `top_k` is not read."""

    chooses = False
    reads_top_k = False

    @property
    def slots(self) -> int:
        """E: every row gets all experts."""
        return self.num_experts

    def initial(self, width: int) -> dict[str, Tensor]:
        """Return no weights."""
        return {}

    def route(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        *,
        training: bool = False,
        fused: bool = False,
    ) -> Routing:
        """Return all E experts with weight 1/E for each row of x (T, in)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = torch.zeros(len(x), self.num_experts, dtype=dtype, device=x.device)
        shares = torch.full_like(logits, 1 / self.num_experts)
        experts = torch.arange(self.num_experts, device=x.device).repeat(len(x), 1)
        return Routing(logits, shares, experts, shares)

    def auxiliary_loss(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return 0."""
        return statistics["fractions"].new_zeros(())
