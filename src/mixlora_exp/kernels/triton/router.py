"""The router in one launch: logits, softmax, top-k and normalised weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.routers.top_k import route
from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["route_triton"]

MAX_EXPERTS = 64


@triton.jit(do_not_specialize=["T"])
def _router_kernel(
    x,
    router,
    logits,
    probabilities,
    experts,
    weights,
    T,
    D,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """x (T, D), router (E, D) to logits, probabilities (T, E), experts, weights (T, K).

    EXPERTS and SLOTS are E and K padded. Grid: (token tiles,).
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = token < T
    row = token.to(tl.int64)
    number = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    total = tl.zeros((BT, EXPERTS), tl.float32)
    for start in range(0, D, BD):
        inner = start + tl.arange(0, BD)
        within = inner < D
        tile = tl.load(
            x + row[:, None] * D + inner[None, :],
            mask=real[:, None] & within[None, :],
            other=0.0,
        )
        rows = tl.load(
            router + number[:, None] * D + inner[None, :],
            mask=(number < E)[:, None] & within[None, :],
            other=0.0,
        )
        # float32 products in full: near ties decide which expert a token gets.
        total = tl.dot(
            tile.to(tl.float32), tl.trans(rows.to(tl.float32)), total, input_precision="ieee"
        )
    exists = (number < E)[None, :]
    total = tl.where(exists, total, float("-inf"))
    shares = tl.exp(total - tl.max(total, axis=1)[:, None])
    shares = shares / tl.sum(shares, axis=1)[:, None]
    inside = real[:, None] & exists
    offsets = row[:, None] * E + number[None, :]
    tl.store(logits + offsets, total, mask=inside)
    tl.store(probabilities + offsets, shares, mask=inside)
    # The order of choice. NaN counts as the largest, as in `topk`; every key of an expert that
    # exists and is not yet taken is above the others', so the K chosen exist and are distinct.
    key = tl.where(shares == shares, shares, float("inf"))
    key = tl.where(exists, key, -1.0)
    taken = tl.zeros((BT, SLOTS), tl.int32)
    values = tl.zeros((BT, SLOTS), tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(key, axis=1, tie_break_left=True)
        hit = number[None, :] == best[:, None]
        value = tl.sum(tl.where(hit, shares, 0.0), axis=1)
        key = tl.where(hit, -2.0, key)
        now = (slot == k)[None, :]
        taken = tl.where(now, best[:, None], taken)
        values = tl.where(now, value[:, None], values)
    values = values / tl.sum(values, axis=1)[:, None]
    inside = real[:, None] & (slot < K)[None, :]
    offsets = row[:, None] * K + slot[None, :]
    tl.store(experts + offsets, taken.to(tl.int64), mask=inside)
    tl.store(weights + offsets, values, mask=inside)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, router, top_k):
        tokens, experts = len(x), router.shape[0]

        def make(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((tokens, width), dtype=dtype, device=x.device)

        logits, probabilities = make(experts, torch.float32), make(experts, torch.float32)
        chosen, weights = make(top_k, torch.int64), make(top_k, torch.float32)
        # 16 tokens a program: even 2,048 of them are then 128 programs.
        rows = 16
        with torch.cuda.device_of(x):
            _router_kernel[(triton.cdiv(tokens, rows),)](
                x,
                router,
                logits,
                probabilities,
                chosen,
                weights,
                tokens,
                x.shape[1],
                E=experts,
                EXPERTS=max(16, triton.next_power_of_2(experts)),
                K=top_k,
                SLOTS=triton.next_power_of_2(top_k),
                BT=rows,
                BD=64,
                num_warps=4,
                num_stages=3,
            )
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, router, probabilities, chosen)
        return logits, probabilities, chosen, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits, dprobabilities, _, dweights):
        x, router, probabilities, chosen = ctx.saved_tensors
        found = [] if dprobabilities is None else [dprobabilities]
        if dweights is not None:
            values = probabilities.gather(1, chosen)
            total = values.sum(dim=1, keepdim=True)
            along = (dweights * values).sum(dim=1, keepdim=True) / total
            dvalues = (dweights - along) / total
            found.append(torch.zeros_like(probabilities).scatter(1, chosen, dvalues))
        parts = [] if dlogits is None else [dlogits]
        if found:
            upstream = sum(found)
            along = (upstream * probabilities).sum(dim=1, keepdim=True)
            parts.append(probabilities * (upstream - along))
        if not parts:
            return None, None, None
        with torch.autocast(x.device.type, enabled=False):
            gradient = sum(parts)
            dx = (gradient @ router.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
            drouter = (gradient.T @ x.float()).to(router.dtype)
        return dx, drouter, None


def route_triton(x: Tensor, router: Tensor, top_k: int) -> Routing:
    """`route`, fused: x (T, D); router (E, D). Equal probabilities go to the lowest expert.

    What the kernel does not take (float64, more than 64 experts, no tokens, `torch.compile`, a
    device without Triton) is left to `route`.
    """
    on_device = INTERPRETED or x.is_cuda
    known = {torch.float32, torch.float16, torch.bfloat16}
    if (
        not on_device
        or torch.compiler.is_compiling()
        or not {x.dtype, router.dtype} <= known
        or router.shape[0] > MAX_EXPERTS
        or len(x) == 0
    ):
        return route(x, router, top_k)
    return Routing(*_Route.apply(x.contiguous(), router.contiguous(), top_k))
