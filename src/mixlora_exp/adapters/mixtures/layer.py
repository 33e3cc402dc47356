"""A linear layer with a mixture of LoRA experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from mixlora_exp.adapters.config import scaling_of
from mixlora_exp.adapters.dropout import keyed_mask
from mixlora_exp.adapters.frozen import frozen_linear, is_linear, refuse_merge
from mixlora_exp.adapters.mixtures.config import MixtureConfig
from mixlora_exp.adapters.routed_layer import RoutedLayer
from mixlora_exp.adapters.several_linear import several_linear
from mixlora_exp.kernels import Frozen, Mixture, Sizes, matrix_of, working_dtype
from mixlora_exp.kernels.dropout import drop
from mixlora_exp.kernels.mixture_base import dense_weights

__all__ = ["MixtureLinear"]


class MixtureLinear(nn.Module, RoutedLayer):
    """`y = W x + b + branch(drop(x))`, see `kernels.mixture_base.Mixture`; one dropout mask for all
    experts, which the router does not see.

    Parameters of an adapter, each a `ParameterDict` entry under its name: `lora_NAME` for those
    that its method names (`lora_A` (E, R, in), `lora_B` (E, out, R), ...), `lora_router` and what
    else its router holds. The base layer is an `nn.Linear`, or a LoRA layer on one, whose adapters
    this layer serves as well.

    See `RoutedLayer` for what it holds after a forward pass.

    Raises:
        ValueError: the base is no `nn.Linear`, or several adapters are active at once.
    """

    expert_parts = ("lora_A", "lora_B")
    """Parameters with a slice for each expert, unless the experts share one."""
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "mixture", "router")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MixtureConfig, name: str
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        if not is_linear(self.get_base_layer()):
            raise ValueError(
                f"mixture={config.mixture} needs {name} to be an nn.Linear, found "
                f"{type(self.get_base_layer()).__name__}"
            )
        self._start_without_adapters(adapter_name)
        for kind in ("lora_A", "lora_B", "lora_router"):
            self._parameters_called(kind)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.mixture: dict[str, Mixture] = {}
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: MixtureConfig, name: str) -> None:
        """Add an adapter with fresh weights. name: of this layer in the model."""
        experts, chosen = config.experts_at(name)
        base, method = self.get_base_layer(), config.make_mixture()
        sizes = Sizes(experts, config.r, base.in_features, base.out_features)
        scaling = method.scaling(sizes, scaling_of(config))
        self.r[adapter_name], self.lora_alpha[adapter_name] = config.r, config.lora_alpha
        self.scaling[adapter_name], self.mixture[adapter_name] = scaling, method
        self.lora_dropout[adapter_name] = config.lora_dropout
        if config.inference_mode:
            # A file's weights come next.
            made = {part: torch.zeros(shape) for part, shape in method.shapes(sizes).items()}
        else:
            made = method.initial(sizes, matrix_of(base), scaling)
        fixed = [f"lora_{part}" for part in method.fixed]
        if method.router is not None:
            router = config.make_router(experts, chosen, base.in_features)
            self.router[adapter_name] = router
            held = {
                f"router_{part}" if part else "router": weight
                for part, weight in router.initial(base.in_features).items()
            }
            made |= held
            fixed += [] if router.trained else [f"lora_{part}" for part in held]
        weights = {f"lora_{part}": weight for part, weight in made.items()}
        self._add_weights(adapter_name, weights, fixed, trained=not config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute `W x + b` and the active adapter's branch of x (..., in): (..., out)."""
        self.routings = {}
        if self.row_map:
            return several_linear(self, x)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.r]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"a mixture runs one adapter at a time, active are {active}")
        dtype = working_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            y = self.adapt(self.frozen(dtype).linear(rows), rows, active)
        return y.view(*x.shape[:-1], y.shape[-1])

    def adapt(self, frozen: Tensor, rows: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return what `RowsLinear.adapt` does: for one adapter of this layer, or those of the LoRA
        layer below."""
        adapter = adapters[0]
        if adapter not in self.r:
            if hasattr(self.base_layer, "adapt"):
                return self.base_layer.adapt(frozen, rows, adapters)
            return self._biased(frozen)
        self.ran_with_gradients = torch.is_grad_enabled()
        weights = None
        if adapter in self.router:
            weights = dense_weights(self.route(rows, adapter))
        p = self.lora_dropout[adapter] if self.training else 0.0
        mask = keyed_mask(self.dropout_keys.get(adapter), "input", tuple(rows.shape), p, rows)
        parts = {part: own.to(rows.dtype) for part, own in self._parts(adapter).items()}
        method, scaling = self.mixture[adapter], self.scaling[adapter]
        return self._biased(frozen + method.branch(drop(rows, mask), weights, parts, scaling))

    def kind_of(self, adapter: str) -> object:
        """Return None for an adapter of this layer, which runs alone; see `RowsLinear.kind_of`."""
        if adapter in self.r or not hasattr(self.base_layer, "kind_of"):
            return None
        return self.base_layer.kind_of(adapter)

    def frozen(self, dtype: torch.dtype) -> Frozen:
        """Return the base layer's weight in a dtype, without its bias."""
        return frozen_linear(self.get_base_layer(), dtype)

    def _biased(self, y: Tensor) -> Tensor:
        bias = self.get_base_layer().bias
        return y if bias is None else y + bias.to(y.dtype)

    def _parts(self, adapter: str) -> dict[str, Tensor]:
        """Return the adapter's weights by their names in its method, the router's apart."""
        names = [n for n in self.adapter_layer_names if not n.startswith("lora_router")]
        held = {name.removeprefix("lora_"): getattr(self, name) for name in names}
        return {part: own[adapter] for part, own in held.items() if adapter in own}

    def statistics(
        self, adapter: str, mask: Tensor | None, types: Tensor | None
    ) -> dict[str, Tensor]:
        """Return what the loss of an adapter needs of the last pass; see `Mixture.statistics`."""
        router, routing = self.router[adapter], self.routings[adapter]
        return self.mixture[adapter].statistics(router, routing, mask, types)

    def auxiliary_loss(self, adapter: str, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of an adapter's method and router without its coefficient, a scalar."""
        return self.mixture[adapter].auxiliary_loss(self.router[adapter], statistics)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the adapter as a matrix (out, in), for a method that can be merged."""
        return self.mixture[adapter].delta(self._parts(adapter), self.scaling[adapter])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; see PEFT.

        Raises:
            ValueError: with `safe_merge`, the result would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.r:
                continue
            refuse_merge(self.get_base_layer())
            weight = self.get_base_layer().weight
            merged = weight + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"the weights of adapter {name!r} are not finite")
            weight.data = merged.detach()
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the adapters that were added; see PEFT."""
        while self.merged_adapters:
            weight = self.get_base_layer().weight
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)
