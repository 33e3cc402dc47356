"""The feed-forward block over the rows of several adapters: the frozen products once for all rows,
each adapter's part separately. Not used with one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mixlora_exp.adapters.frozen import frozen_linear
from mixlora_exp.adapters.row_map import RowMap, Segment, join, take
from mixlora_exp.kernels import FeedForward, Kernel, Router, Routing, working_dtype
from mixlora_exp.kernels.activations import Activation, activate

if TYPE_CHECKING:
    from mixlora_exp.kernels.mixlora.stage import Finish


class SegmentedBlock(Protocol):
    """What this needs of a feed-forward block; see `adapters.layer.MixLoraFeedForward`."""

    base_layer: nn.Module
    base_activation: Activation
    row_map: RowMap
    router: Mapping[str, Router]

    def kernel_on(self, device: torch.device) -> Kernel: ...  # noqa: D102
    def frozen(self, role: str) -> nn.Linear: ...  # noqa: D102
    def projection_layer(self, role: str) -> nn.Module: ...  # noqa: D102
    def run(self, rows: Tensor, adapter: str, dtype: torch.dtype) -> Tensor: ...  # noqa: D102
    def route(self, rows: Tensor, adapter: str, *, fused: bool) -> Routing: ...  # noqa: D102
    def block(self, adapter: str, rows: int, dtype: torch.dtype) -> FeedForward: ...  # noqa: D102


def several_feed_forward(layer: SegmentedBlock, x: Tensor) -> Tensor:
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
    layer: SegmentedBlock, x: Tensor, gate: Tensor, up: Tensor, adapter: str
) -> tuple[Tensor, Finish]:
    """Return the stage of an adapter without experts: PEFT's LoRA layers inside the base block."""

    def adapted(role: str, frozen: Tensor, rows: Tensor) -> Tensor:
        inner = layer.projection_layer(role)
        if hasattr(inner, "adapt"):
            return inner.adapt(frozen, rows, [adapter])
        return frozen if inner.bias is None else frozen + inner.bias.to(frozen.dtype)

    hidden = activate(adapted("gate", gate, x), layer.base_activation) * adapted("up", up, x)
    return hidden, lambda y: adapted("down", y, hidden)
