"""Statistics and loss of a model's routers in its last forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixlora_exp.adapters.routed_layer import RoutedLayer
from mixlora_exp.adapters.row_map import RowMap

__all__ = ["RouterReport", "collect", "counted_shape"]


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
        """Return a copy whose loss has no autograd graph."""
        return RouterReport(self.loss.detach(), self.counts)


def collect(layers: Sequence[RoutedLayer], row_map: RowMap) -> dict[str, RouterReport]:
    """Return the report of each adapter in the last pass, with the graph of its loss."""
    adapters = dict.fromkeys(name for layer in layers for name in layer.routings)
    return {
        name: _report([layer for layer in layers if name in layer.routings], name, row_map)
        for name in adapters
    }


def counted_shape(model: nn.Module, adapter: str) -> tuple[int, int] | None:
    """Return the shape (routers, E) of `RouterReport.counts` of an adapter; None without
    routers."""
    routers = [
        module.router[adapter]
        for module in model.modules()
        if isinstance(module, RoutedLayer) and adapter in module.router
    ]
    return (len(routers), max(router.num_experts for router in routers)) if routers else None


def _report(layers: Sequence[RoutedLayer], adapter: str, row_map: RowMap) -> RouterReport:
    # Statistics can be stacked for routers of equal shape only.
    groups: dict[tuple[int, int], list[int]] = {}
    for number, layer in enumerate(layers):
        router = layer.router[adapter]
        groups.setdefault((router.num_experts, router.top_k), []).append(number)
    found = [_of_group([layers[n] for n in own], adapter, row_map) for own in groups.values()]
    if len(found) == 1:
        return found[0]
    device = found[0].counts.device
    total, counts = torch.zeros((), device=device), {}
    widest = max(experts for experts, _ in groups)
    for numbers, report in zip(groups.values(), found, strict=True):
        # The mean over all routers is one of the groups' means, by their sizes.
        summed = layers[0].router[adapter].loss_reduction == "sum"
        share = 1.0 if summed else len(numbers) / len(layers)
        total = total + share * report.loss.to(device)
        padded = functional.pad(report.counts, (0, widest - report.counts.shape[1])).to(device)
        counts |= dict(zip(numbers, padded, strict=True))
    return RouterReport(total, torch.stack([counts[number] for number in range(len(layers))]))


def _of_group(layers: Sequence[RoutedLayer], adapter: str, row_map: RowMap) -> RouterReport:
    """Return the report of routers that have the same E and K."""
    each, types = [], row_map.types.get(adapter)
    for layer in layers:
        experts = layer.routings[adapter].experts
        mask = row_map.real(adapter, len(experts), experts.device)
        each.append(layer.statistics(adapter, mask, types))
    gathered = layers[0].router[adapter].gathered(each)
    loss = layers[0].auxiliary_loss(adapter, gathered)
    return RouterReport(loss, gathered["counts"].detach())
