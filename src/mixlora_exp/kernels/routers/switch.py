"""The Switch Transformer's router: one expert per row, and each expert holds so many rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixlora_exp.kernels.router_base import is_expert, ranked, router
from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.softmax_router import SoftmaxRouter, real_counts

__all__ = ["Switch"]


@router("switch")
@dataclass(frozen=True, kw_only=True)
class Switch(SoftmaxRouter):
    """The most probable expert e of each row, w_e = p_e, or 1 with `normalise`.

    An expert takes the first C = ceil(capacity_factor T / E) of its rows in the order of the batch
    (example after example, each by position), where T counts the real rows of the forward pass:
    padding takes no place. Rows beyond that go through the feed-forward block without experts, with
    the same weight p_e; padding gets nothing from the block. Inference does the same as training,
    so that a row's output depends on the rows beside it, and token by token on fewer of them; a
    capacity_factor of E drops nothing.

    Loss: E sum_e F_e P_e with the share F_e of rows that prefer e, before any is dropped; 1 at
    balance. `top_k` and `router_loss` are not read; a run refuses a `top_k` above 1.

    What moe-peft trains: `capacity` above 0: C, of each expert in each sequence of the batch and
    not of all of it, in which padding takes places; skip: rows without a place get p_e x in place
    of the feed-forward block, x its input; padding_in_loss: padding counts in both losses.
    """

    single = True
    block_options = ("skip",)
    normalise: bool = False
    z_loss: float = 1e-3
    capacity_factor: float = 1.25
    capacity: int = 0
    skip: bool = False
    padding_in_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.capacity_factor > 0, "capacity_factor", "must be > 0")
        self.require(self.capacity >= 0, "capacity", "must be >= 0")

    @property
    def by_sequence(self) -> bool:
        """True if `capacity` counts the rows of each sequence."""
        return self.capacity > 0

    @property
    def slots(self) -> int:
        """1: a row gets one expert or none."""
        return 1

    @property
    def base_share(self) -> float:
        """Where all rows prefer one expert: what is beyond its capacity. With `capacity` that is
        nearly all of a long sequence, counted as all."""
        held = 0.0 if self.capacity else self.capacity_factor / self.num_experts
        return max(0.0, 1 - held)

    @property
    def skips(self) -> bool:
        """True if rows without a place get p_e x in place of the base's output (option `skip`)."""
        return self.skip

    def choose(
        self,
        logits: Tensor,
        probabilities: Tensor,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Routing:
        """Return each row's most probable expert, with weight 0 beyond the expert's capacity, where
        the probability goes to `base`, or in padding, which the block leaves out."""
        experts = ranked(logits)[:, :1].contiguous()
        most = probabilities.gather(1, experts)
        wanted = is_expert(experts[:, 0], self.num_experts).long()
        if self.capacity:
            capacity = self.capacity
            whole = mask is None or mask.dim() == 1
            wanted = wanted.view(1 if whole else len(mask), -1, self.num_experts)
        else:
            if mask is not None:
                wanted = wanted * mask.unsqueeze(-1)
            # In float64, as the formula in a person's hands.
            real = wanted.sum().double()
            capacity = (self.capacity_factor * real / self.num_experts).ceil()
        place = (wanted.cumsum(dim=-2) * wanted).sum(dim=-1).view(-1, 1)
        held = (place > 0) & (place <= capacity)
        base, kept = torch.where(held, 0.0, most)[:, 0], torch.where(held, most, 0.0)
        if mask is not None and not self.capacity:
            base = base * mask
        return Routing(logits, probabilities, experts, kept, base=base, skips=self.skip)

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        """Return `SoftmaxRouter.statistics` with F_e counted before rows are dropped."""
        seen = None if self.padding_in_loss else mask
        preferred = replace(routing, weights=torch.ones_like(routing.weights))
        found = super().statistics(routing, seen)
        found["fractions"] = super().statistics(preferred, seen)["fractions"]
        return real_counts(found, routing, mask) if self.padding_in_loss else found
