"""PEFT's LoRA layer with the fused forward pass; parameters, files and file format stay PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as stock
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from mixlora_exp.adapters.cache_source import Source, source_on
from mixlora_exp.adapters.dropout import input_mask
from mixlora_exp.adapters.frozen import is_linear
from mixlora_exp.adapters.several_linear import RowsLinear, StockLinear, several_linear
from mixlora_exp.adapters.shared_input import Siblings, find_siblings
from mixlora_exp.adapters.weight_cache import CachesWeights, cached_weights, share_cache
from mixlora_exp.kernels import is_quantized, lora, working_dtype
from mixlora_exp.kernels.lora_many import lora_add, lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart

QUANTIZED = ("peft.tuners.lora.bnb", "peft.tuners.lora.torchao")
"""Modules with PEFT's LoRA layers on quantised projections."""


class FusedLinear(CachesWeights, RowsLinear):
    """`peft.tuners.lora.Linear` whose LoRA and DoRA run through `kernels.lora`.

    What the fused form does not have (several active adapters, `adapter_names`, merged weights,
    other variants, LoRA with bias, layers that are no `nn.Linear`) runs as PEFT does it. Made by
    `use_linear_kernel`, which changes the class of PEFT's layers in place.
    """

    add = staticmethod(lora_add)
    """Adds adapters of one shape to the frozen product; see `lora_add`."""
    siblings: tuple[Siblings, str] | None = None
    """The layers that share its input, and its name among them, where it has any."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out) of x (..., in): fused, or as PEFT computes it where the fused form does
        not apply."""
        if self.row_map:
            return several_linear(self, x)
        name = None if args else self._fused_adapter(kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)
        if self.siblings is None:
            (y,) = self.compute(x, [self], name)
        else:
            siblings, own = self.siblings
            y = siblings.output(own, self, x, name)
        return y.view(*x.shape[:-1], y.shape[-1])

    def compute(self, x: Tensor, layers: Sequence[FusedLinear], adapter: str) -> list[Tensor]:
        """Compute the outputs, each (T, out), of layers that share the input x (..., in), with one
        adapter and new dropout masks; biases included."""
        dtype, hashed = working_dtype(x), lora.steps_on(x.device).HASHED
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            frozen = [layer.frozen(dtype) for layer in layers]
            parts = [layer._part(adapter, rows, hashed=hashed) for layer in layers]
            ys = lora.lora_linears(rows, frozen, parts)
            return [layer.biased(y) for layer, y in zip(layers, ys, strict=True)]

    def joins(self, other: FusedLinear, adapter: str) -> bool:
        """Return whether this layer can be computed when `other` is called, for the same input and
        adapter: nothing that happens before its own call may matter."""
        base, others = self.base_layer, other.base_layer
        return (
            type(self) is type(other)
            and not self.row_map
            and self._fused_adapter({}) == adapter
            and base.in_features == others.in_features
            and base.weight.device == others.weight.device
            and not self._forward_pre_hooks
            and "forward" not in vars(self)
        )

    def adapt(self, frozen: Tensor, rows: Tensor, adapters: Sequence[str]) -> Tensor:
        """Add adapters of one shape to the frozen product (T, out) in one batched pass, and the
        bias."""
        if adapters[0] in self.lora_A:
            shares = rows.tensor_split(len(adapters))
            parts = [self._part(name, own) for name, own in zip(adapters, shares, strict=True)]
            frozen = self.add(frozen, rows, *parts)
        return self.biased(frozen)

    def kind_of(self, adapter: str) -> object:
        """Return (rank, whether it is DoRA) of an adapter of this layer, None for one that it does
        not have."""
        return (self.r[adapter], adapter in self.lora_variant) if adapter in self.lora_A else None

    def _part(self, name: str, rows: Tensor, *, hashed: bool = False) -> LowRankPart:
        """Return the adapter for its rows (T, in), with a new dropout mask, as a `HashMask` if
        `hashed`."""
        own, made = cached_weights(self, name, rows.dtype)
        mask = input_mask(self.lora_dropout[name], rows, hashed=hashed)
        return LowRankPart(own.a, own.b, own.scaling, own.magnitude, made.norm, mask, made.low)

    def source_of(self, part: str, adapter: str) -> Source | None:
        """Return an adapter's weights in this layer, None if it has none."""
        if adapter not in self.lora_A:
            return None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dora = adapter in self.lora_variant
        magnitude = self.lora_magnitude_vector[adapter].weight if dora else None
        return source_on(self.base_layer, a, b, self.scaling[adapter], magnitude)

    def _fused_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """Return the adapter to run fused, None if PEFT's own forward pass is needed."""
        if self.disable_adapters or self.merged or any(v is not None for v in kwargs.values()):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or not is_linear(self.base_layer) or self.fan_in_fan_out:
            return None
        (name,) = active
        variant = self.lora_variant.get(name)
        plain = variant is None or type(variant) is DoraLinearVariant
        frozen = not self.base_layer.weight.requires_grad
        return name if plain and frozen and not self.lora_bias[name] else None


class ReferenceLinear(FusedLinear):
    """LoRA and DoRA by plain tensor operations: the reference for `FusedLinear`."""

    add = staticmethod(lora_add_reference)

    def compute(self, x: Tensor, layers: Sequence[FusedLinear], adapter: str) -> list[Tensor]:
        """Compute the outputs, each (T, out), by plain tensor operations."""
        rows = x.reshape(-1, x.shape[-1]).to(working_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            frozen = self.frozen(rows.dtype).linear(rows)
            return [self.biased(lora_add_reference(frozen, rows, self._part(adapter, rows)))]

    def kind_of(self, adapter: str) -> object:
        """Return None: each adapter runs alone."""
        return None


def use_linear_kernel(model: nn.Module, form: str) -> None:
    """Let PEFT's LoRA layers of `model` run in a `Kernel.linear` form: PEFT's own forward pass for
    `peft`, plain operations for `plain`, else fused."""
    wanted = {"peft": stock.Linear, "plain": ReferenceLinear}.get(form, FusedLinear)
    own = (stock.Linear, StockLinear, FusedLinear, ReferenceLinear)
    for module in model.modules():
        if type(module).__module__ in QUANTIZED and is_quantized(module.base_layer):
            module.peft_class = type(module)
        # Exact types: other special layers keep their own.
        if type(module) in own or type(module) is getattr(module, "peft_class", None):
            mixed = wanted is stock.Linear and getattr(module, "row_map", None) is not None
            # A layer that PEFT has made cannot change its forward pass otherwise, and a new one
            # would lose its hooks and its place in others' lists.
            stays = wanted is stock.Linear and getattr(module, "peft_class", None)
            module.__class__ = StockLinear if mixed else stays or wanted
    find_siblings(model, FusedLinear)
    share_cache(model)
