"""PEFT's LoRA layer with the fused forward pass; parameters, files and file format stay PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as stock
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from mixlora_exp.adapters.dropout import KeyedDropout
from mixlora_exp.adapters.norms import NormCache
from mixlora_exp.adapters.rows import RowMap, Segment, join, take
from mixlora_exp.kernels import dora_norms, draw_mask, squared_row_norms, working_dtype
from mixlora_exp.kernels.lora.linear import (
    lora_add,
    lora_add_reference,
    lora_linear,
    lora_linear_reference,
)
from mixlora_exp.kernels.lora.many import LowRankPart, lora_add_many

__all__ = ["FusedLinear", "ReferenceLinear", "StockLinear", "use_linear_kernel"]


class _RowsLinear(stock.Linear):
    """A LoRA layer that can serve the rows of several adapters in one pass."""

    row_map: RowMap | None = None
    """Shared by the layers of a model of the MixLoRA tuner, None in a model of PEFT's own."""

    def adapt(self, frozen: Tensor, rows: Tensor, adapter: str) -> Tensor:
        """What `adapter` makes of its rows (T, in), given `W x` (T, out): with the bias, which
        DoRA's scale leaves alone."""
        raise NotImplementedError

    def biased(self, y: Tensor) -> Tensor:
        """`y` (T, out) with the base layer's bias, if it has one."""
        bias = self.base_layer.bias
        return y if bias is None else y + bias.to(y.dtype)

    def groups_of(self, segments: Sequence[Segment]) -> list[list[Segment]]:
        """Segments that may be computed together."""
        return [[segment] for segment in segments]

    def adapt_group(self, rows: Tensor, frozen: Tensor, group: Sequence[Segment]) -> list[Tensor]:
        """What the adapters of a group make of their rows, one after another, as `adapt` does."""
        return [self.adapt(take(frozen, s), take(rows, s), s.adapter) for s in group]

    def forward_rows(self, x: Tensor) -> Tensor:
        """`W x` once over all rows, then the adapter of each segment on its own."""
        segments, dtype = self.row_map.of(x), working_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            frozen = nn.functional.linear(rows, self.base_layer.weight.to(dtype))
            parts = [self.adapt_group(rows, frozen, group) for group in self.groups_of(segments)]
            y = join([y for group in parts for y in group], segments)
        return y.view(*x.shape[:-1], y.shape[-1])


class StockLinear(_RowsLinear):
    """`peft.tuners.lora.Linear`, each segment as PEFT computes it."""

    def adapt(self, frozen: Tensor, rows: Tensor, adapter: str) -> Tensor:
        # PEFT takes the base layer's whole output, and its bias away again where DoRA scales.
        frozen = self.biased(frozen)
        if adapter not in self.lora_A:
            return frozen
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        rows = rows.to(a.weight.dtype)
        if adapter in self.lora_variant:
            y = self.lora_variant[adapter].forward(
                self, active_adapter=adapter, x=rows, result=frozen
            )
        else:
            y = frozen + b(a(self.lora_dropout[adapter](rows))) * self.scaling[adapter]
        return y.to(frozen.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward_rows(x) if self.row_map else super().forward(x, *args, **kwargs)


class FusedLinear(_RowsLinear):
    """`peft.tuners.lora.Linear` whose LoRA and DoRA run through `kernels.linear.lora_linear`.

    What the fused form does not have (several active adapters, `adapter_names`, merged weights,
    other variants, LoRA with bias, layers that are no `nn.Linear`) runs as PEFT does it. Made by
    `use_linear_kernel`, which changes the class of PEFT's layers in place.
    """

    kernel = staticmethod(lora_linear)
    adding_kernel = staticmethod(lora_add)
    batched = True

    @property
    def norms(self) -> NormCache:
        if "_norms" not in self.__dict__:
            self.__dict__["_norms"] = NormCache()
        return self.__dict__["_norms"]

    def train(self, mode: bool = True) -> FusedLinear:
        # A trainer calls `train()` before every micro-batch: that alone changes nothing.
        if not (mode and self.training):
            self.norms.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedLinear:
        # `to`, `float` and the like may round the weights and give them their old memory back.
        self.norms.clear(frozen=True)
        return super()._apply(*args, **kwargs)

    def _fused_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The adapter to run fused, None if PEFT's own forward pass is needed."""
        if self.disable_adapters or self.merged or any(v is not None for v in kwargs.values()):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or type(self.base_layer) is not nn.Linear or self.fan_in_fan_out:
            return None
        (name,) = active
        variant = self.lora_variant.get(name)
        plain = variant is None or type(variant) is DoraLinearVariant
        frozen = not self.base_layer.weight.requires_grad
        return name if plain and frozen and not self.lora_bias[name] else None

    def _norm(self, name: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        squared = self.norms.get(
            ("weight", ""), (weight,), lambda: squared_row_norms(weight), frozen=True
        )
        return self.norms.get(
            ("norm", name),
            (weight, a, b),
            lambda: dora_norms(weight, squared, a[None], b[None], self.scaling[name])[0],
            scaling=self.scaling[name],
        )

    def _low_rank(self, name: str, rows: Tensor) -> dict[str, Any]:
        """What the kernels take beside rows (T, in) and weight, dropout drawn anew."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        magnitude = norm = None
        if name in self.lora_variant:
            magnitude = self.lora_magnitude_vector[name].weight
            norm = self._norm(name, self.base_layer.weight, a, b)
        dropout = self.lora_dropout[name]
        p = getattr(dropout, "p", 0.0) if self.training else 0.0
        keyed = p > 0.0 and isinstance(dropout, KeyedDropout)
        source = dropout.key.generator("input", rows.device) if keyed else None
        return {
            "a": a,
            "b": b,
            "scaling": self.scaling[name],
            "magnitude": magnitude,
            "norm": norm,
            "mask": draw_mask(rows.shape, p, rows.device, source),
        }

    def groups_of(self, segments: Sequence[Segment]) -> list[list[Segment]]:
        """Neighbours with equal numbers of rows, ranks and kinds."""
        groups: list[list[Segment]] = []
        last = None
        for segment in segments:
            key = self._shape_of(segment)
            if key is not None and key == last:
                groups[-1].append(segment)
            else:
                groups.append([segment])
            last = key
        return groups

    def _shape_of(self, segment: Segment) -> tuple | None:
        """What must agree for products to be batched; None where they are not."""
        name, rows = segment.adapter, segment.rows
        if name not in self.lora_A or not isinstance(rows, slice) or not self.batched:
            return None
        return rows.stop - rows.start, self.r[name], name in self.lora_variant

    def adapt_group(self, rows: Tensor, frozen: Tensor, group: Sequence[Segment]) -> list[Tensor]:
        if len(group) == 1:
            return super().adapt_group(rows, frozen, group)
        span = slice(group[0].rows.start, group[-1].rows.stop)
        parts = [LowRankPart(**self._low_rank(s.adapter, take(rows, s))) for s in group]
        return [self.biased(lora_add_many(frozen[span], rows[span], parts))]

    def adapt(self, frozen: Tensor, rows: Tensor, adapter: str) -> Tensor:
        if adapter in self.lora_A:
            frozen = self.adding_kernel(frozen, rows, **self._low_rank(adapter, rows))
        return self.biased(frozen)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.row_map:
            return self.forward_rows(x)
        name = None if args else self._fused_adapter(kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)
        weight, dtype = self.base_layer.weight, working_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = self.biased(self.kernel(rows, weight.to(dtype), **self._low_rank(name, rows)))
        return y.view(*x.shape[:-1], y.shape[-1])


class ReferenceLinear(FusedLinear):
    """The same by plain operations."""

    kernel = staticmethod(lora_linear_reference)
    adding_kernel = staticmethod(lora_add_reference)
    batched = False


def use_linear_kernel(model: nn.Module, kernel: str) -> None:
    """Let PEFT's LoRA layers of `model` run with `kernel`: PEFT's own forward pass for `peft`,
    plain operations for `reference`, else fused."""
    wanted = {"peft": stock.Linear, "reference": ReferenceLinear}.get(kernel, FusedLinear)
    for module in model.modules():
        # Exact types: quantised and other special layers keep their own.
        if type(module) in (stock.Linear, StockLinear, FusedLinear, ReferenceLinear):
            mixed = wanted is stock.Linear and getattr(module, "row_map", None) is not None
            module.__class__ = StockLinear if mixed else wanted
