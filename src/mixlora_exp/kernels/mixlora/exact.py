"""MixLoRA with each frozen weight applied once per token (exact, not an approximation).

The down projection is linear and shared by all experts, so

    sum_k w_k (W2 h_k + s B2_k A2_k h_k)  =  W2 (sum_k w_k h_k)  +  s sum_k w_k B2_k A2_k h_k

and W1, W3 and W2 run once per token whatever K is. With DoRA the row scale of an expert stands
before the sum, so W2 runs on K hidden states; gate and up still run once. For the backward pass
only x, W1 x, W3 x and the routing are kept; the experts' part is computed again from them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mixlora_exp.kernels.mixlora import dense, grouped
from mixlora_exp.kernels.mixlora.bias import add_down_bias
from mixlora_exp.kernels.mixlora.packing import pack, unpack
from mixlora_exp.kernels.shapes import FeedForward, Routing

__all__ = [
    "grouped_is_faster",
    "mixlora_exact",
    "mixlora_exact_dense",
    "mixlora_exact_grouped",
    "recomputed_hidden_states",
]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, weights, experts, *tensors):
        block = unpack(spec, tensors)
        gate = functional.linear(x, block.gate.weight)
        up = functional.linear(x, block.up.weight)
        y, kept = grouped.forward(x, gate, up, experts, weights, block)
        ctx.spec = spec
        ctx.save_for_backward(x, weights, experts, gate, up, kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weights, experts, gate, up, kept, *tensors = ctx.saved_tensors
        block = unpack(ctx.spec, tensors)
        with torch.autocast(x.device.type, enabled=False):
            dx, dweights, gradients = grouped.backward(
                dy.contiguous(), x, gate, up, experts, weights, block, kept
            )
        return None, dx, dweights, None, *gradients.flat(block)


class _Recomputed(torch.autograd.Function):
    """`dense.hidden_states`, computed again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx, spec, x, gate, up, experts, weights, *tensors):
        ctx.spec = spec
        ctx.save_for_backward(x, gate, up, experts, weights, *tensors)
        return dense.hidden_states(x, gate, up, experts, weights, unpack(spec, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:]
        inputs = [
            tensor if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        device = ctx.saved_tensors[0].device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            x, gate, up, experts, weights, *tensors = inputs
            block = unpack(ctx.spec, tensors)
            made = dense.hidden_states(x, gate, up, experts, weights, block)
            # Where few parameters are trained, an output may depend on none of them, or both.
            pairs = [
                (m, g)
                for m, g in zip(made, grads, strict=True)
                if m is not None and m.requires_grad
            ]
            wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
            found = iter([None] * len(wanted))
            if pairs:
                outputs, upstream = zip(*pairs, strict=True)
                found = iter(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def mixlora_exact_grouped(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`, tokens grouped by expert. x: (T, D); returns (T, D).

    Raises:
        ValueError: a frozen weight or bias asks for a gradient.
    """
    if not all(projection.is_frozen for projection in block.projections.values()):
        raise ValueError("kernel=exact needs frozen base weights: use kernel=shared to train them")
    if len(x) == 0:
        return torch.zeros_like(x)
    spec, tensors = pack(block)
    y = _Grouped.apply(spec, x, routing.weights, routing.experts, *tensors)
    return add_down_bias(y, routing.weights, block)


def recomputed_hidden_states(
    x: Tensor, gate: Tensor, up: Tensor, experts: Tensor, weights: Tensor, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """`dense.hidden_states`, of which nothing is kept for the backward pass."""
    inputs = (x, gate, up, experts, weights)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        # The compiler decides by itself what to keep and what to compute again.
        return dense.hidden_states(*inputs, block)
    spec, tensors = pack(block)
    return _Recomputed.apply(spec, *inputs, *tensors)


def mixlora_exact_dense(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """The same over all experts' columns at once. x: (T, D); returns (T, D)."""
    gate = functional.linear(x, block.gate.weight)
    up = functional.linear(x, block.up.weight)
    inputs = (x, gate, up, routing.experts, routing.weights)
    hidden, columns = recomputed_hidden_states(*inputs, block)
    return dense.combine(hidden, columns, routing.experts, routing.weights, block)


def grouped_is_faster(x: Tensor, block: FeedForward) -> bool:
    """By `results/bench/forms-cpu.json`: on a CPU always, but for MixDoRA's K hidden states per
    token in bf16 at large widths. Compiled or on a GPU nothing may depend on the data."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    wide = x.dtype is torch.bfloat16 and x.shape[1] >= 2048 and x.shape[0] >= 64
    return torch.is_grad_enabled() or not (block.down.has_scale and wide)


def mixlora_exact(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """The form that is faster for this device and shape. x: (T, D); returns (T, D)."""
    form = mixlora_exact_grouped if grouped_is_faster(x, block) else mixlora_exact_dense
    return form(x, routing, block)
