"""A control at scoring: each token gets the experts that were trained for other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mixlora_exp.adapters.mixed_adapters import routed_layers_of
from mixlora_exp.kernels import MIXTURES, Router, Routing

__all__ = ["has_routers", "shuffle_experts"]


def has_routers(kind: str, method: str) -> bool:
    """Return whether a saved adapter of a PEFT type has routers; method: the mixture, if it is
    one."""
    return kind == "MIXLORA" or (method in MIXTURES and MIXTURES[method].router is not None)


def shuffle_experts(model: nn.Module, adapter: str, seed: int) -> None:
    """Let every router of an adapter send a row to the expert `order[e]` in place of e, with the
    weight of e. The orders are drawn from `seed`, one for each router in the model's order, as
    random cycles through all E experts: none keeps its rows, unless it is the only one."""
    generator = torch.Generator().manual_seed(seed)
    for layer in routed_layers_of(model, adapter).values():
        router = layer.router[adapter]
        layer.router[adapter] = _Shuffled(router, _cycle(router.num_experts, generator))


def _cycle(count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Return a permutation of 0 to count - 1 that is one cycle (Sattolo's algorithm)."""
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (), generator=generator))
        order[last], order[other] = order[other], order[last]
    return tuple(order)


@dataclass(frozen=True)
class _Shuffled:
    """A router whose decisions name other experts."""

    router: Router
    order: Sequence[int]

    def route_masked(self, *args: Any, **kwargs: Any) -> Routing:
        routing = self.router.route_masked(*args, **kwargs)
        order = torch.tensor(self.order, device=routing.experts.device)
        return replace(routing, experts=order[routing.experts])

    def __getattr__(self, name: str) -> Any:
        if name == "router" or name.startswith("__"):
            raise AttributeError(name)  # A copy is asked before it has its fields.
        return getattr(self.router, name)
