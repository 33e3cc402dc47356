"""The Switch Transformer's router: one expert per row, and each expert holds so many rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.routing import ranked, router
from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.softmax_router import SoftmaxRouter

__all__ = ["Switch"]


@router("switch")
@dataclass(frozen=True, kw_only=True)
class Switch(SoftmaxRouter):
    """The most probable expert e of each row, w_e = p_e, or 1 with `normalise`.

    An expert takes the first C = ceil(capacity_factor T / E) of its rows in the order of the batch
    (example after example, each by position), where T counts the real rows of the forward pass:
    padding takes no place. Rows beyond that, and padding, go through the feed-forward block without
    experts, with the same weight p_e. Inference does the same as training, so that a row's output
    depends on the rows beside it, and token by token on fewer of them; a capacity_factor of E drops
    nothing.

    Loss: E sum_e F_e P_e with the share F_e of rows that prefer e, before any is dropped; 1 at
    balance. `top_k` and `router_loss` are not read.
    """

    normalise: bool = False
    z_loss: float = 1e-3
    capacity_factor: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.capacity_factor > 0, "capacity_factor", "must be > 0")

    @property
    def slots(self) -> int:
        return 1

    def choose(
        self,
        logits: Tensor,
        probabilities: Tensor,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Routing:
        experts = ranked(logits)[:, :1].contiguous()
        most = probabilities.gather(1, experts)
        wanted = functional.one_hot(experts[:, 0], self.num_experts)
        if mask is not None:
            wanted = wanted * mask.unsqueeze(-1)
        # In float64, as the formula in a person's hands.
        real = wanted.sum().double()
        capacity = (self.capacity_factor * real / self.num_experts).ceil()
        place = (wanted.cumsum(dim=0) * wanted).sum(dim=-1, keepdim=True)
        held = (place > 0) & (place <= capacity)
        base = torch.where(held, 0.0, most)[:, 0]
        return Routing(logits, probabilities, experts, torch.where(held, most, 0.0), base=base)

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        preferred = replace(routing, weights=torch.ones_like(routing.weights))
        found = super().statistics(routing, mask)
        return {**found, "fractions": super().statistics(preferred, mask)["fractions"]}
