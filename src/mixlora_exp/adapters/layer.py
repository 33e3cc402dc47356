"""The feed-forward block of MixLoRA: frozen projections, E LoRA experts, one router."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mixlora_exp.adapters.cache_source import Source, source_on
from mixlora_exp.adapters.config import MixLoraConfig, scaling_of
from mixlora_exp.adapters.dropout import keyed_mask
from mixlora_exp.adapters.frozen import frozen_linear, is_linear
from mixlora_exp.adapters.initial import initial_weights
from mixlora_exp.adapters.routed_layer import RoutedLayer
from mixlora_exp.adapters.several_feed_forward import several_feed_forward
from mixlora_exp.adapters.weight_cache import CachesWeights
from mixlora_exp.kernels import (
    KERNELS,
    ROLES,
    Experts,
    FeedForward,
    Kernel,
    Projection,
    known_activation,
    resolve_kernel,
    working_dtype,
)

__all__ = ["MixLoraFeedForward"]


class MixLoraFeedForward(CachesWeights, RoutedLayer):
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)` over frozen shared weights (paper, Section 3.2).

    Parameters of an adapter, each a `ParameterDict` entry under its name: `lora_router` (E, D) and
    what else its router holds, and per adapted projection p of gate, up, down `lora_A_p`
    (E, R, in), `lora_B_p` (E, out, R) and with DoRA `lora_magnitude_p` (E, out).

    See `RoutedLayer` for what it holds after a forward pass.

    Raises:
        ValueError: the block is not made of three `nn.Linear`, or several adapters are active at
            once for the same rows (a router cannot be shared by two sets of experts).
    """

    cached_parts = ROLES
    expert_parts = tuple(
        f"lora_{part}_{role}" for role in ROLES for part in ("A", "B", "magnitude")
    )
    """Parameters with a slice for each expert."""
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "activation", "router",
    )  # fmt: skip

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MixLoraConfig, name: str
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.projection_names = dict(zip(ROLES, config.feed_forward_targets, strict=True))
        for role, own in self.projection_names.items():
            projection = self.frozen(role) if hasattr(base_layer, own) else None
            if not is_linear(projection):
                raise ValueError(
                    f"MixLoRA needs {own} of {type(base_layer).__name__} to be an nn.Linear, "
                    f"found {type(projection).__name__}"
                )
        self._start_without_adapters(adapter_name)
        for part in ("lora_router", *self.expert_parts):
            self._parameters_called(part)
        for setting in self.other_param_names:
            setattr(self, setting, {})
        self.kernel = "auto"
        self.base_activation = known_activation(base_layer.act_fn)
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: MixLoraConfig, name: str) -> None:
        """Add an adapter with fresh weights. name: of this block in the model."""
        if list(self.projection_names.values()) != list(config.feed_forward_targets):
            raise ValueError(
                f"feed_forward_targets={config.feed_forward_targets} differ from those of the "
                f"adapters already there, {list(self.projection_names.values())}"
            )
        projections = {role: self.frozen(role) for role in ROLES}
        width = projections["gate"].in_features
        lora, router = config.experts, config.make_router(*config.experts_at(name), width)
        self.r[adapter_name], self.lora_alpha[adapter_name] = lora.r, lora.lora_alpha
        self.scaling[adapter_name] = scaling_of(lora)
        self.lora_dropout[adapter_name] = lora.lora_dropout
        self.use_dora[adapter_name], self.router[adapter_name] = lora.use_dora, router
        own = None if config.act_fn is None else known_activation(ACT2FN[config.act_fn])
        self.activation[adapter_name] = own or self.base_activation
        weights = initial_weights(config, router, projections)
        fixed = [] if router.trained else [n for n in weights if n.startswith("lora_router")]
        self._add_weights(adapter_name, weights, fixed, trained=not config.inference_mode)

    def forward(self, x: Tensor, *args: Any, kept: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Compute the block of the active adapter for x (..., D).

        Returns the same shape or, of the flattened rows with the numbers `kept` alone, (n, D). The
        router decides about all rows either way, and its report has them.
        """
        self.routings, self.ran_with_gradients = {}, torch.is_grad_enabled()
        if self.row_map:
            assert kept is None, "the rows of several adapters are computed together"
            return several_feed_forward(self, x)
        active = [name for name in self.active_adapters if name in self.router]
        if self.disable_adapters or not active:
            x = x if kept is None else x.flatten(0, -2)[kept]
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"MixLoRA runs one adapter at a time, active are {active}")
        rows = x.reshape(-1, x.shape[-1])
        y = self.run(rows, active[0], working_dtype(x), kept)
        return y.view(x.shape) if kept is None else y

    def run(
        self, rows: Tensor, adapter: str, dtype: torch.dtype, kept: Tensor | None = None
    ) -> Tensor:
        """Compute the block of one adapter for its rows (T, D), or those numbered `kept`, frozen
        projections included."""
        kernel = self.kernel_on(rows.device)
        routing = self.route(rows, adapter, fused=kernel.device is not None)
        rows = rows if routing.rows is None else routing.rows
        if kept is not None:
            rows, routing = rows[kept], routing.at(kept)
        block = self.block(adapter, len(rows), dtype)
        with torch.autocast(rows.device.type, enabled=False):
            return kernel(rows.to(dtype), routing, block)

    def kernel_on(self, device: torch.device) -> Kernel:
        """Return the chosen kernel; `auto` is resolved where the block then is."""
        return KERNELS[resolve_kernel(self.kernel, device.type)]

    def block(self, adapter: str, rows: int, dtype: torch.dtype) -> FeedForward:
        """Return the kernels' description of this block for `rows` tokens in `dtype` with this
        adapter. Draws new dropout masks in training mode."""
        gate, up, down = (self._projection(role, adapter, dtype) for role in ROLES)
        p = self.lora_dropout[adapter] if self.training else 0.0
        key = self.dropout_keys.get(adapter)
        base = self.frozen("gate")
        kernel = self.kernel_on(base.weight.device)
        low = {"input": gate.experts or up.experts, "hidden": down.experts}
        rates = {part: p if low[part] and not kernel.draws_masks else 0.0 for part in low}
        hashed = kernel.device is not None
        masks = [
            keyed_mask(key, part, (rows, width), rates[part], base.weight, hashed=hashed)
            for part, width in (("input", base.in_features), ("hidden", base.out_features))
        ]
        return FeedForward(gate, up, down, self.activation[adapter], p, *masks, key)

    def _projection(self, role: str, adapter: str, dtype: torch.dtype) -> Projection:
        base = self.frozen(role)
        frozen = frozen_linear(base, dtype, biased=True)
        own = self.source_of(role, adapter)
        if own is None:
            return Projection(frozen)
        taken = own.a.dtype if self.kernel_on(base.weight.device).casts else dtype
        made = self.weight_cache.of(self, role, adapter, own, taken)
        experts = Experts(own.a, own.b, own.scaling, own.magnitude, made.norm, made.low)
        return Projection(frozen, experts)

    def source_of(self, part: str, adapter: str) -> Source | None:
        """Return an adapter's weights for the projection `part` (gate, up, down), None if it has
        none there."""
        a = getattr(self, f"lora_A_{part}")
        if adapter not in a:
            return None
        b, magnitude = getattr(self, f"lora_B_{part}")[adapter], None
        if self.use_dora[adapter]:
            magnitude = getattr(self, f"lora_magnitude_{part}")[adapter]
        return source_on(self.frozen(part), a[adapter], b, self.scaling[adapter], magnitude)

    def projection_layer(self, role: str) -> nn.Module:
        """Return the projection as it stands in the base block, maybe under a plain LoRA."""
        return getattr(self.base_layer, self.projection_names[role])

    def frozen(self, role: str) -> nn.Linear:
        """Return the base model's own projection."""
        layer = self.projection_layer(role)
        return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer

    def _base_weight(self) -> Tensor:
        return self.frozen("gate").weight
