"""The feed-forward block of MixLoRA: frozen projections, E LoRA experts, one router."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mixlora_exp.adapters.config import MixLoraConfig
from mixlora_exp.adapters.norms import NormCache
from mixlora_exp.kernels import (
    KERNELS,
    Experts,
    FeedForward,
    Projection,
    Routing,
    dora_norms,
    draw_mask,
    known_activation,
    resolve_kernel,
    route_bfloat16,
    router_of,
    squared_row_norms,
    working_dtype,
)

__all__ = ["MixLoraFeedForward"]

ROLES = ("gate", "up", "down")


class MixLoraFeedForward(nn.Module, BaseTunerLayer):
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)` over frozen shared weights (paper, Section 3.2).

    Parameters of an adapter, each a `ParameterDict` entry under its name: `lora_router` (E, D),
    and per adapted projection p of gate, up, down `lora_A_p` (E, R, in), `lora_B_p` (E, out, R)
    and with DoRA `lora_magnitude_p` (E, out).

    After each forward pass `routing` holds the router's decision for the rows of that pass.

    Raises:
        ValueError: the block is not made of three `nn.Linear` without bias, or several adapters
            are active at once (a router cannot be shared by two sets of experts).
    """

    adapter_layer_names = (
        "lora_router",
        *(f"lora_{part}_{role}" for role in ROLES for part in ("A", "B", "magnitude")),
    )
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "top_k", "use_dora", "activation",
        "router_precision",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MixLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.projection_names = dict(zip(ROLES, config.feed_forward_targets, strict=True))
        for name in self.projection_names.values():
            projection = getattr(base_layer, name, None)
            # Exact type: a subclass (a quantised one, say) may not hold its weight as a matrix.
            if type(projection) is not nn.Linear or projection.bias is not None:
                raise ValueError(
                    f"MixLoRA needs {name} of {type(base_layer).__name__} to be an nn.Linear "
                    f"without bias, found {type(projection).__name__}"
                )
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            setattr(self, name, {})
        self.kernel = "auto"
        self._base_activation = known_activation(base_layer.act_fn)
        self.routing: Routing | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def train(self, mode: bool = True) -> MixLoraFeedForward:
        # A trainer calls `train()` before every micro-batch: that alone changes nothing.
        if not (mode and self.training):
            self._norms.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> MixLoraFeedForward:
        # `to`, `float` and the like may round the weights and give them their old memory back.
        self._norms.clear(frozen=True)
        return super()._apply(*args, **kwargs)

    @property
    def in_features(self) -> int:
        return self._frozen("gate").in_features

    def _frozen(self, role: str) -> nn.Linear:
        return getattr(self.base_layer, self.projection_names[role])

    def update_layer(self, adapter_name: str, config: MixLoraConfig) -> None:
        """Add an adapter: A as PEFT's LoRA draws it, B zero, router N(0, router_init_std)."""
        if list(self.projection_names.values()) != list(config.feed_forward_targets):
            raise ValueError(
                f"feed_forward_targets={config.feed_forward_targets} differ from those of the "
                f"adapters already there, {list(self.projection_names.values())}"
            )
        # Anew, since a new adapter may lie where a deleted one of its name lay.
        self._norms = NormCache()
        lora = config.experts
        self.r[adapter_name] = lora.r
        self.lora_alpha[adapter_name] = lora.lora_alpha
        self.scaling[adapter_name] = lora.scaling
        self.lora_dropout[adapter_name] = lora.lora_dropout
        self.top_k[adapter_name] = config.top_k
        self.router_precision[adapter_name] = config.router_precision
        self.use_dora[adapter_name] = lora.use_dora
        self.activation[adapter_name] = (
            self._base_activation
            if config.act_fn is None
            else known_activation(ACT2FN[config.act_fn])
        )
        self.lora_router[adapter_name] = nn.Parameter(
            torch.randn(config.num_experts, self.in_features) * config.router_init_std
        )
        for role, name in self.projection_names.items():
            if name not in config.expert_targets:
                continue
            frozen = self._frozen(role)
            a = torch.empty(config.num_experts, lora.r, frozen.in_features)
            # PEFT's kaiming_uniform(a=sqrt(5)) is uniform in +-1/sqrt(fan_in) of each expert.
            nn.init.uniform_(
                a, -1 / math.sqrt(frozen.in_features), 1 / math.sqrt(frozen.in_features)
            )
            b = torch.zeros(config.num_experts, frozen.out_features, lora.r)
            if not config.init_lora_weights:
                nn.init.uniform_(b, -1 / math.sqrt(lora.r), 1 / math.sqrt(lora.r))
            getattr(self, f"lora_A_{role}")[adapter_name] = nn.Parameter(a)
            getattr(self, f"lora_B_{role}")[adapter_name] = nn.Parameter(b)
            if lora.use_dora:
                # With B = 0 the magnitude is the row norm of W; random B (tests) start from it too.
                norms = squared_row_norms(frozen.weight.detach()).sqrt()
                getattr(self, f"lora_magnitude_{role}")[adapter_name] = nn.Parameter(
                    norms.to(a.device).expand(config.num_experts, -1).clone()
                )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        """Where the base is, and float32 or better: experts, router and above all magnitudes must
        not be rounded to the base's bf16 on their way into the optimizer."""
        weight = self._frozen("gate").weight
        return weight.device, torch.promote_types(weight.dtype, torch.float32)

    def _projection(self, role: str, adapter: str, dtype: torch.dtype) -> Projection:
        weight = self._frozen(role).weight
        if adapter not in getattr(self, f"lora_A_{role}"):
            return Projection(weight.to(dtype))
        a = getattr(self, f"lora_A_{role}")[adapter]
        b = getattr(self, f"lora_B_{role}")[adapter]
        scaling = self.scaling[adapter]
        if not self.use_dora[adapter]:
            return Projection(weight.to(dtype), Experts(a, b, scaling))
        squared = self._norms.get(
            (role, ""), (weight,), lambda: squared_row_norms(weight), frozen=True
        )
        norm = self._norms.get(
            (role, adapter),
            (weight, a, b),
            lambda: dora_norms(weight, squared, a, b, scaling),
            scaling=scaling,
        )
        magnitude = getattr(self, f"lora_magnitude_{role}")[adapter]
        return Projection(weight.to(dtype), Experts(a, b, scaling, magnitude, norm))

    def block(self, adapter: str, rows: int, dtype: torch.dtype) -> FeedForward:
        """What the kernels take for `rows` tokens in `dtype` with this adapter, dropout masks
        drawn anew; dropout only in training mode."""
        gate, up, down = (self._projection(role, adapter, dtype) for role in ROLES)
        p = self.lora_dropout[adapter] if self.training else 0.0
        drawn = 0.0 if self.kernel == "peft" else p
        device, (inner, hidden) = gate.weight.device, gate.weight.shape
        low = gate.experts is not None or up.experts is not None
        return FeedForward(
            gate,
            up,
            down,
            self.activation[adapter],
            p,
            draw_mask((rows, hidden), drawn if low else 0.0, device),
            draw_mask((rows, inner), drawn if down.experts is not None else 0.0, device),
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., D); returns the same shape."""
        active = [name for name in self.active_adapters if name in self.lora_router]
        self.routing = None
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"MixLoRA runs one adapter at a time, active are {active}")
        (adapter,) = active
        rows = x.reshape(-1, x.shape[-1])
        name = resolve_kernel(self.kernel, x.device.type)
        rounded = self.router_precision[adapter] == "bfloat16"
        router = route_bfloat16 if rounded else router_of(name)
        self.routing = router(rows, self.lora_router[adapter], self.top_k[adapter])
        dtype = working_dtype(x)
        block = self.block(adapter, rows.shape[0], dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = KERNELS[name](rows.to(dtype), self.routing, block)
        return y.view(x.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "MixLoRA cannot be merged into the base weights: the router chooses experts per token"
        )
