"""Common base of layers with a router per adapter: parameters, routing and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixlora_exp.adapters.row_map import RowMap
from mixlora_exp.kernels import DropoutKey, Router, Routing

__all__ = ["RoutedLayer"]


class RoutedLayer(BaseTunerLayer):
    """A PEFT layer whose adapters each have a router; the other base class is an `nn.Module`.

    After each forward pass `routings` holds the router's decision of each adapter that ran, for its
    rows of that pass, and `ran_with_gradients` whether autograd followed it.
    """

    def _start_without_adapters(self, active: str) -> None:
        """Set the attributes that PEFT and the report read. active: the first adapter's name."""
        self.merged_adapters: list[str] = []
        self.adapter_layer_names: tuple[str, ...] = ()
        self.router: dict[str, Router] = {}
        self.dropout_keys: dict[str, DropoutKey] = {}
        self.routings: dict[str, Routing] = {}
        self.ran_with_gradients = False
        self.row_map = RowMap()
        self._active_adapter = active

    def _parameters_called(self, name: str) -> nn.ParameterDict:
        """Return the `ParameterDict` stored as attribute `name`, one entry per adapter; at first
        use it is created and registered with PEFT."""
        if name not in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
            self.adapter_layer_names = (*self.adapter_layer_names, name)
        return getattr(self, name)

    def _add_weights(
        self, adapter: str, weights: Mapping[str, Tensor], fixed: Sequence[str], *, trained: bool
    ) -> None:
        """Add an adapter's weights by parameter name, on the base layer's device. fixed: names that
        are never trained; trained: the others are."""
        for name, weight in weights.items():
            self._parameters_called(name)[adapter] = nn.Parameter(weight)
        if fixed:
            names = {**self.frozen_peft_weight_names, adapter: tuple(fixed)}
            self.frozen_peft_weight_names = names
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=not trained)

    def route(self, rows: Tensor, adapter: str, *, fused: bool = False) -> Routing:
        """Return the router's decision for rows (T, in), and keep it for the report on this pass.
        fused: in one launch of a Triton kernel, where the router has one."""
        held = {
            name.removeprefix("lora_router").removeprefix("_"): getattr(self, name)[adapter]
            for name in self.adapter_layer_names
            if name.startswith("lora_router") and adapter in getattr(self, name)
        }
        router, key = self.router[adapter], self.dropout_keys.get(adapter)
        mask = self.row_map.seen_by(router, adapter, len(rows), rows.device)
        routing = router.route_masked(
            rows, held, mask, training=self.training, fused=fused, key=key
        )
        # Without its rows, which the report does not need.
        self.routings[adapter] = replace(routing, rows=None)
        self.detach_recomputed()
        return routing

    def detach_recomputed(self) -> None:
        """Detach the routers' decisions if checkpointing computes the layer again: until the next
        pass, their graph would keep what the whole layer saves. Code that is being compiled cannot
        tell; whoever calls it does this after it."""
        if _in_backward() and self.row_map.reported:
            self.routings = {name: found.detached() for name, found in self.routings.items()}

    @property
    def routing(self) -> Routing | None:
        """The router's decision in the last pass, if one adapter ran in it."""
        found = list(self.routings.values())
        return found[0] if len(found) == 1 else None

    def statistics(
        self, adapter: str, mask: Tensor | None, types: Tensor | None
    ) -> dict[str, Tensor]:
        """Return what the loss of an adapter's router needs of the last pass; see
        `Router.statistics` and, for types, `Mixture.statistics`."""
        return self.router[adapter].statistics(self.routings[adapter], mask)

    def auxiliary_loss(self, adapter: str, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of an adapter's router without its coefficient, a scalar."""
        return self.router[adapter].auxiliary_loss(statistics)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        """Return the base's device, and float32 or better: experts, router and above all magnitudes
        must not be rounded to the base's bf16 on their way into the optimizer."""
        weight = self._base_weight()
        return weight.device, torch.promote_types(weight.dtype, torch.float32)

    def _base_weight(self) -> Tensor:
        """Return a frozen weight of the base layer."""
        return self.get_base_layer().weight


def _in_backward() -> bool:
    """Return whether autograd runs a backward pass, as torch's own checkpointing asks; never in
    code that is being compiled."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
