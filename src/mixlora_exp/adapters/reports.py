"""What the routers of a model did in its last pass, and their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.adapters.rows import RowMap
from mixlora_exp.kernels import Router, Routing

__all__ = ["Routed", "RouterReport", "collect"]


@dataclass(frozen=True, slots=True)
class RouterReport:
    """Router statistics of one forward pass.

    `loss`: the router loss without its coefficient, Eq. (8) for most routers; `counts`
    (routers, E): tokens, without padding, routed to each expert, 0 for those that a router with
    fewer experts does not have. One router per feed-forward block or linear layer.
    """

    loss: Tensor
    counts: Tensor

    def detached(self) -> RouterReport:
        """A copy whose loss has no autograd graph."""
        return RouterReport(self.loss.detach(), self.counts)


class Routed(Protocol):
    """A layer with a router per adapter."""

    router: dict[str, Router]
    routings: dict[str, Routing]
    """By adapter, of the last pass."""

    def statistics(
        self, adapter: str, mask: Tensor | None, types: Tensor | None
    ) -> dict[str, Tensor]:
        """As `Router.statistics`, of `routings[adapter]`."""

    def auxiliary_loss(self, adapter: str, statistics: Mapping[str, Tensor]) -> Tensor:
        """As `Router.auxiliary_loss`."""


def collect(layers: Sequence[Routed], row_map: RowMap) -> dict[str, RouterReport]:
    """The report of each adapter in the last pass, with the graph of its loss."""
    adapters = dict.fromkeys(name for layer in layers for name in layer.routings)
    return {
        name: _report([layer for layer in layers if name in layer.routings], name, row_map)
        for name in adapters
    }


def _report(layers: Sequence[Routed], adapter: str, row_map: RowMap) -> RouterReport:
    # Statistics can be stacked for routers of equal shape only.
    groups: dict[tuple[int, int], list[int]] = {}
    for number, layer in enumerate(layers):
        router = layer.router[adapter]
        groups.setdefault((router.num_experts, router.top_k), []).append(number)
    widest = max(experts for experts, _ in groups)
    losses, counts = [], {}
    for numbers in groups.values():
        each = []
        for number in numbers:
            experts = layers[number].routings[adapter].experts
            mask = row_map.real(adapter, len(experts), experts.device)
            types = row_map.types.get(adapter)
            each.append(layers[number].statistics(adapter, mask, types))
        first = layers[numbers[0]]
        router = first.router[adapter]
        gathered = router.gathered(each)
        loss = first.auxiliary_loss(adapter, gathered)
        summed = router.loss_reduction == "sum"
        # The mean over all routers, of means over those of a group.
        share = 1.0 if summed or len(groups) == 1 else len(numbers) / len(layers)
        losses.append(loss if share == 1.0 else share * loss)
        for number, row in zip(numbers, gathered["counts"].detach(), strict=True):
            counts[number] = functional.pad(row, (0, widest - len(row)))
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    device = counts[0].device
    rows = [counts[number].to(device) for number in range(len(layers))]
    return RouterReport(total, torch.stack(rows))
