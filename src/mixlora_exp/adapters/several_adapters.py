"""Forward passes of layers over the rows of several adapters: the frozen products once for all
rows, each adapter's part separately. Not used with one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixlora_exp.adapters.frozen import frozen_linear
from mixlora_exp.adapters.row_map import Segment, join, take
from mixlora_exp.kernels import working_dtype
from mixlora_exp.kernels.activations import activate

if TYPE_CHECKING:
    from mixlora_exp.adapters.layer import MixLoraFeedForward
    from mixlora_exp.adapters.linear import RowsLinear
    from mixlora_exp.kernels.mixlora.stage import Finish

__all__ = ["several_feed_forward", "several_linear"]


def several_feed_forward(layer: MixLoraFeedForward, x: Tensor) -> Tensor:
    """Return the feed-forward block, each segment of rows with its adapter: experts, plain LoRA, or
    only the base. x: (..., D); returns the same shape."""
    segments, dtype = layer.row_map.of(x), working_dtype(x)
    for inner in layer.base_layer.children():
        # Their own forward passes, which begin with this, are not called here.
        if hasattr(inner, "routings"):
            inner.routings = {}
    rows = x.reshape(-1, x.shape[-1])
    kernel = layer.kernel_on(x.device)

    def is_whole(segment: Segment) -> bool:
        """Return whether the segment's kernel computes the frozen products itself."""
        return kernel.stage is None and segment.adapter in layer.router

    with torch.autocast(x.device.type, enabled=False):
        inputs = rows.to(dtype)
        bases = [frozen_linear(layer.frozen(role), dtype) for role in ("gate", "up", "down")]
        needed = not all(map(is_whole, segments))
        gates, ups = (base.linear(inputs) if needed else None for base in bases[:2])
        outputs: list[Tensor | None] = []
        hiddens, finishes = [], []
        for segment in segments:
            own, adapter = take(rows, segment), segment.adapter
            if is_whole(segment):
                outputs.append(layer.run(own, adapter, dtype))
                continue
            sides = take(gates, segment), take(ups, segment)
            if adapter in layer.router:
                routing = layer.route(own, adapter, fused=kernel.device is not None)
                own = own if routing.rows is None else routing.rows
                block = layer.block(adapter, len(own), dtype)
                hidden, finish = kernel.staged(own.to(dtype), *sides, routing, block)
            else:
                hidden, finish = _plain_stage(layer, own.to(dtype), *sides, adapter)
            outputs.append(None)
            hiddens.append(hidden)
            finishes.append(finish)
        if hiddens:
            joined = hiddens[0] if len(hiddens) == 1 else torch.cat(hiddens)
            products = bases[2].linear(joined).split([len(h) for h in hiddens])
            made = iter([f(part) for f, part in zip(finishes, products, strict=True)])
            outputs = [next(made) if y is None else y for y in outputs]
        y = join(outputs, segments)
    return y.view(x.shape)


def _plain_stage(
    layer: MixLoraFeedForward, x: Tensor, gate: Tensor, up: Tensor, adapter: str
) -> tuple[Tensor, Finish]:
    """Return the stage of an adapter without experts: PEFT's LoRA layers inside the base block."""

    def adapted(role: str, frozen: Tensor, rows: Tensor) -> Tensor:
        inner = layer.projection_layer(role)
        if hasattr(inner, "adapt"):
            return inner.adapt(frozen, rows, [adapter])
        return frozen if inner.bias is None else frozen + inner.bias.to(frozen.dtype)

    hidden = activate(adapted("gate", gate, x), layer.base_activation) * adapted("up", up, x)
    return hidden, lambda y: adapted("down", y, hidden)


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
