"""The feed-forward block of MixLoRA: frozen projections, E LoRA experts, one router."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from mixlora_exp.adapters.config import MixLoraConfig
from mixlora_exp.adapters.norms import NormCache
from mixlora_exp.adapters.rows import RowMap, join, take
from mixlora_exp.kernels import (
    KERNELS,
    DropoutKey,
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
from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.mixlora.stages import STAGES, Finish

__all__ = ["MixLoraFeedForward"]

ROLES = ("gate", "up", "down")


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """The module without the adapter layer around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class MixLoraFeedForward(nn.Module, BaseTunerLayer):
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)` over frozen shared weights (paper, Section 3.2).

    Parameters of an adapter, each a `ParameterDict` entry under its name: `lora_router` (E, D),
    and per adapted projection p of gate, up, down `lora_A_p` (E, R, in), `lora_B_p` (E, out, R)
    and with DoRA `lora_magnitude_p` (E, out).

    After each forward pass `routings` holds the router's decision of each adapter that ran, for
    its rows of that pass, and `ran_with_gradients` whether autograd followed it. Where `row_map`
    gives the rows to several adapters, the frozen projections run once over all of them and each
    adapter's part on its own rows.

    Raises:
        ValueError: the block is not made of three `nn.Linear`, or several adapters are active at
            once for the same rows (a router cannot be shared by two sets of experts).
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
            projection = unwrapped(getattr(base_layer, name, None))
            # Exact type: a subclass (a quantised one, say) may not hold its weight as a matrix.
            if type(projection) is not nn.Linear:
                raise ValueError(
                    f"MixLoRA needs {name} of {type(base_layer).__name__} to be an nn.Linear, "
                    f"found {type(projection).__name__}"
                )
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            setattr(self, name, {})
        self.kernel = "auto"
        self.dropout_keys: dict[str, DropoutKey] = {}
        self._base_activation = known_activation(base_layer.act_fn)
        self.routings: dict[str, Routing] = {}
        self.ran_with_gradients = False
        self.row_map = RowMap()
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

    @property
    def routing(self) -> Routing | None:
        """The router's decision in the last pass, if one adapter ran in it."""
        found = list(self.routings.values())
        return found[0] if len(found) == 1 else None

    def _frozen(self, role: str) -> nn.Linear:
        return unwrapped(self._projection_layer(role))

    def _projection_layer(self, role: str) -> nn.Module:
        """The projection as it stands in the base block, maybe under a plain LoRA."""
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
        frozen = self._frozen(role)
        weight, bias = frozen.weight, frozen.bias
        shared = {"weight": weight.to(dtype), "bias": None if bias is None else bias.to(dtype)}
        if adapter not in getattr(self, f"lora_A_{role}"):
            return Projection(**shared)
        a = getattr(self, f"lora_A_{role}")[adapter]
        b = getattr(self, f"lora_B_{role}")[adapter]
        scaling = self.scaling[adapter]
        if not self.use_dora[adapter]:
            return Projection(**shared, experts=Experts(a, b, scaling))
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
        return Projection(**shared, experts=Experts(a, b, scaling, magnitude, norm))

    def block(self, adapter: str, rows: int, dtype: torch.dtype) -> FeedForward:
        """What the kernels take for `rows` tokens in `dtype` with this adapter, dropout masks
        drawn anew; dropout only in training mode."""
        gate, up, down = (self._projection(role, adapter, dtype) for role in ROLES)
        p = self.lora_dropout[adapter] if self.training else 0.0
        drawn = 0.0 if self.kernel == "peft" else p
        key = self.dropout_keys.get(adapter) if p else None
        device, (inner, hidden) = gate.weight.device, gate.weight.shape
        low = gate.experts is not None or up.experts is not None

        def source(part: str) -> torch.Generator | None:
            return None if key is None else key.generator(part, device)

        return FeedForward(
            gate,
            up,
            down,
            self.activation[adapter],
            p,
            draw_mask((rows, hidden), drawn if low else 0.0, device, source("input")),
            draw_mask(
                (rows, inner),
                drawn if down.experts is not None else 0.0,
                device,
                source("hidden"),
            ),
            source("experts") if self.kernel == "peft" else None,
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., D); returns the same shape."""
        self.routings = {}
        self.ran_with_gradients = torch.is_grad_enabled()
        if self.row_map:
            return self._forward_rows(x)
        active = [name for name in self.active_adapters if name in self.lora_router]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"MixLoRA runs one adapter at a time, active are {active}")
        (adapter,) = active
        rows = x.reshape(-1, x.shape[-1])
        return self._whole(rows, adapter, working_dtype(x)).view(x.shape)

    def _route(self, rows: Tensor, adapter: str, kernel: str) -> Routing:
        rounded = self.router_precision[adapter] == "bfloat16"
        router = route_bfloat16 if rounded else router_of(kernel)
        self.routings[adapter] = router(rows, self.lora_router[adapter], self.top_k[adapter])
        return self.routings[adapter]

    def _whole(self, rows: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        """The block of one adapter for its rows (T, D), frozen projections included."""
        kernel = resolve_kernel(self.kernel, rows.device.type)
        routing = self._route(rows, adapter, kernel)
        block = self.block(adapter, rows.shape[0], dtype)
        with torch.autocast(rows.device.type, enabled=False):
            return KERNELS[kernel](rows.to(dtype), routing, block)

    def _forward_rows(self, x: Tensor) -> Tensor:
        """Each segment of the rows with its adapter: experts, a plain LoRA, or the base alone."""
        segments, dtype = self.row_map.of(x), working_dtype(x)
        rows = x.reshape(-1, x.shape[-1])
        kernel = resolve_kernel(self.kernel, x.device.type)
        stage = STAGES.get(kernel)
        with torch.autocast(x.device.type, enabled=False):
            inputs = rows.to(dtype)
            gate, up, down = (self._frozen(role).weight.to(dtype) for role in ROLES)
            # Whole experts compute their own.
            shared = stage is not None or any(s.adapter not in self.lora_router for s in segments)
            gates, ups = (
                functional.linear(inputs, weight) if shared else None for weight in (gate, up)
            )
            outputs: list[Tensor | None] = []
            hiddens, finishes = [], []
            for segment in segments:
                own, adapter = take(inputs, segment), segment.adapter
                if stage is None and adapter in self.lora_router:
                    outputs.append(self._whole(take(rows, segment), adapter, dtype))
                    continue
                sides = take(gates, segment), take(ups, segment)
                if adapter not in self.lora_router:
                    hidden, finish = self._plain_stage(own, *sides, adapter)
                else:
                    routing = self._route(take(rows, segment), adapter, kernel)
                    block = self.block(adapter, len(own), dtype)
                    hidden, finish = stage(own, *sides, routing, block)
                outputs.append(None)
                hiddens.append(hidden)
                finishes.append(finish)
            if hiddens:
                joined = hiddens[0] if len(hiddens) == 1 else torch.cat(hiddens)
                products = functional.linear(joined, down).split([len(h) for h in hiddens])
                made = iter([f(part) for f, part in zip(finishes, products, strict=True)])
                outputs = [next(made) if y is None else y for y in outputs]
            y = join(outputs, segments)
        return y.view(x.shape)

    def _plain_stage(
        self, x: Tensor, gate: Tensor, up: Tensor, adapter: str
    ) -> tuple[Tensor, Finish]:
        """The stage of an adapter without experts: PEFT's LoRA layers inside the base block."""

        def adapted(role: str, frozen: Tensor, rows: Tensor) -> Tensor:
            layer = self._projection_layer(role)
            if hasattr(layer, "adapt"):
                return layer.adapt(frozen, rows, adapter)
            return frozen if layer.bias is None else frozen + layer.bias.to(frozen.dtype)

        hidden = self._act(adapted("gate", gate, x)) * adapted("up", up, x)
        return hidden, lambda y: adapted("down", y, hidden)

    def _act(self, x: Tensor) -> Tensor:
        return activate(x, self._base_activation)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "MixLoRA cannot be merged into the base weights: the router chooses experts per token"
        )
