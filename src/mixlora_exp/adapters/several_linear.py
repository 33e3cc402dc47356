"""LoRA layers over the rows of several adapters: the frozen product once for all rows, the part of
each adapter separately. Not used with one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as stock
from torch import Tensor

from mixlora_exp.adapters.frozen import frozen_linear, refuse_merge
from mixlora_exp.adapters.row_map import RowMap, Segment, join, take
from mixlora_exp.kernels import Frozen, working_dtype


class RowsLinear(stock.Linear):
    """A LoRA layer that can serve the rows of several adapters in one pass."""

    peft_class: type[LoraLayer] | None = None
    """PEFT's own class of a layer on a quantised projection."""
    row_map: RowMap | None = None
    """Shared by the layers of a model of the MixLoRA tuner, None in a model of PEFT's own."""

    def adapt(self, frozen: Tensor, rows: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return the outputs (T, out) of adapters of one kind on equal shares of the rows (T, in),
        given the frozen product `W x` (T, out). The bias is added after DoRA's scale."""
        raise NotImplementedError

    def kind_of(self, adapter: str) -> object:
        """Return a key: adapters with equal keys can run in one batched pass. None: `adapter` must
        run alone in this layer."""

    def frozen(self, dtype: torch.dtype) -> Frozen:
        """Return the base layer's weight in a dtype, without its bias."""
        return frozen_linear(self.base_layer, dtype)

    def biased(self, y: Tensor) -> Tensor:
        """Return `y` (T, out) with the base layer's bias added, if it has one."""
        bias = self.base_layer.bias
        return y if bias is None else y + bias.to(y.dtype)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does.

        Raises:
            ValueError: the base weight is quantised.
        """
        refuse_merge(self.base_layer)
        super().merge(*args, **kwargs)


class StockLinear(RowsLinear):
    """`peft.tuners.lora.Linear`, each segment as PEFT computes it."""

    def adapt(self, frozen: Tensor, rows: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return the output (T, out) of the one adapter in `adapters`, by PEFT's own modules."""
        (adapter,) = adapters
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
        """Run PEFT's forward pass, or one adapter per segment of the rows where they belong to
        several."""
        return several_linear(self, x) if self.row_map else super().forward(x, *args, **kwargs)


def several_linear(layer: RowsLinear, x: Tensor) -> Tensor:
    """Compute `W x` once for all rows, then the adapter of each segment; adjacent segments of equal
    shape together. x: (..., in); returns (..., out)."""
    segments, dtype = layer.row_map.of(x), working_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        frozen = layer.frozen(dtype).linear(rows)
        parts = []
        for group in _groups(layer, segments):
            span = group[0]
            if len(group) > 1:
                span = Segment("", slice(group[0].rows.start, group[-1].rows.stop))
            names = [segment.adapter for segment in group]
            parts.append(layer.adapt(take(frozen, span), take(rows, span), names))
        y = join(parts, segments)
    return y.view(*x.shape[:-1], y.shape[-1])


def _groups(layer: RowsLinear, segments: Sequence[Segment]) -> list[list[Segment]]:
    """Return adjacent segments that `adapt` can compute together: equal number of rows, rank and
    kind."""
    groups: list[list[Segment]] = []
    last = None
    for segment in segments:
        kind = layer.kind_of(segment.adapter)
        whole = isinstance(segment.rows, slice) and kind is not None
        key = (segment.rows.stop - segment.rows.start, kind) if whole else None
        if key is not None and key == last:
            groups[-1].append(segment)
        else:
            groups.append([segment])
        last = key
    return groups
