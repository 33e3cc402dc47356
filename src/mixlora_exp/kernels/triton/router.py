"""The router in one launch: logits, softmax, top-k, normalised weights, and what is counted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.shapes import Routing
from mixlora_exp.kernels.top_k_routing import route
from mixlora_exp.kernels.triton.operators import on_device_of, operator, start
from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["route_triton"]

MAX_EXPERTS = 64
# 16 tokens a program: even 2,048 of them are then 128 programs.
ROWS = 16
BACK_ROWS = 32


@triton.jit(do_not_specialize=["T"])
def router_kernel(
    x,
    router,
    mask,
    logits,
    probabilities,
    experts,
    weights,
    report,
    T,
    D,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """x (T, D), router (E, D) to logits, probabilities (T, E), experts, weights (T, K), and report
    (programs, 3, E): of the program's rows, those that MASKED are true in mask (T,), how many have
    each expert first, how many have it at all, and the sum of its probabilities.

    EXPERTS and SLOTS are E and K padded. Grid: (token tiles,).
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = token < T
    row = token.to(tl.int64)
    number = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    total = tl.zeros((BT, EXPERTS), tl.float32)
    for first in range(0, D, BD):
        inner = first + tl.arange(0, BD)
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
    # The order of choice, by logits, since two of them may have one probability. NaN counts as the
    # largest; every key of an expert that exists and is not yet taken is above the others', so the
    # K chosen exist and are distinct.
    key = tl.where(total == total, tl.maximum(total, -3.0e38), float("inf"))
    key = tl.where(exists, key, float("-inf"))
    taken = tl.zeros((BT, SLOTS), tl.int32)
    values = tl.zeros((BT, SLOTS), tl.float32)
    counted = real
    if MASKED:
        counted = real & (tl.load(mask + token, mask=real, other=0) != 0)
    counts = tl.zeros((EXPERTS,), tl.float32)
    report += tl.program_id(0) * 3 * E + number
    for k in tl.static_range(K):
        best = tl.argmax(key, axis=1, tie_break_left=True)
        hit = number[None, :] == best[:, None]
        value = tl.sum(tl.where(hit, shares, 0.0), axis=1)
        key = tl.where(hit, float("-inf"), key)
        now = (slot == k)[None, :]
        taken = tl.where(now, best[:, None], taken)
        values = tl.where(now, value[:, None], values)
        counts += tl.sum((hit & counted[:, None]).to(tl.float32), axis=0)
        if k == 0:
            tl.store(report, counts, mask=number < E)
    tl.store(report + E, counts, mask=number < E)
    sums = tl.sum(tl.where(counted[:, None], shares, 0.0), axis=0)
    tl.store(report + 2 * E, sums, mask=number < E)
    values = values / tl.sum(values, axis=1)[:, None]
    inside = real[:, None] & (slot < K)[None, :]
    offsets = row[:, None] * K + slot[None, :]
    tl.store(experts + offsets, taken.to(tl.int64), mask=inside)
    tl.store(weights + offsets, values, mask=inside)


@triton.jit(do_not_specialize=["T", "steps", "stride"])
def router_backward_kernel(
    x,
    router,
    mask,
    probabilities,
    experts,
    dlogits,
    dprobabilities,
    dweights,
    dreport,
    base,
    dx,
    drouter,
    T,
    D,
    steps,
    stride,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    LOGITS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    REPORT: tl.constexpr,
    BASE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """dx (T, D), with BASE added to base (T, D), and each program's part of drouter, (splits, E, D)
    float32, from the gradients of the outputs of `router_kernel` that the flags name; stride: of
    dreport between programs, of ROWS rows each.

    Grid: (D tiles, splits of T), `steps` token tiles a split.
    """
    number = tl.arange(0, EXPERTS)
    exists = (number < E)[None, :]
    inner = tl.program_id(0) * BD + tl.arange(0, BD)
    within = inner < D
    weight = tl.load(
        router + number[:, None] * D + inner[None, :],
        mask=(number < E)[:, None] & within[None, :],
        other=0.0,
    ).to(tl.float32)
    total = tl.zeros((EXPERTS, BD), tl.float32)
    for step in range(steps):
        token = (tl.program_id(1) * steps + step) * BT + tl.arange(0, BT)
        real = token < T
        row = token.to(tl.int64)
        inside = real[:, None] & exists
        places = row[:, None] * E + number[None, :]
        shares = tl.load(probabilities + places, mask=inside, other=0.0)
        upstream = tl.zeros((BT, EXPERTS), tl.float32)
        if PROBABILITIES:
            upstream += tl.load(dprobabilities + places, mask=inside, other=0.0)
        if WEIGHTS:
            chosen = tl.zeros((BT,), tl.float32)
            along = tl.zeros((BT,), tl.float32)
            for k in range(K):
                expert = tl.load(experts + row * K + k, mask=real, other=0).to(tl.int32)
                hit = number[None, :] == expert[:, None]
                value = tl.sum(tl.where(hit, shares, 0.0), axis=1)
                chosen += value
                along += value * tl.load(dweights + row * K + k, mask=real, other=0.0)
            chosen = tl.where(real, chosen, 1.0)
            for k in range(K):
                expert = tl.load(experts + row * K + k, mask=real, other=0).to(tl.int32)
                hit = number[None, :] == expert[:, None]
                own = tl.load(dweights + row * K + k, mask=real, other=0.0)
                own = (own - along / chosen) / chosen
                upstream += tl.where(hit, own[:, None], 0.0)
        if REPORT:
            counted = real
            if MASKED:
                counted = real & (tl.load(mask + token, mask=real, other=0) != 0)
            sums = dreport + (row // ROWS)[:, None] * stride + 2 * E + number[None, :]
            upstream += tl.load(sums, mask=counted[:, None] & exists, other=0.0)
        gradient = shares * (upstream - tl.sum(upstream * shares, axis=1)[:, None])
        if LOGITS:
            gradient += tl.load(dlogits + places, mask=inside, other=0.0)
        gradient = tl.where(inside, gradient, 0.0)
        area = real[:, None] & within[None, :]
        offsets = row[:, None] * D + inner[None, :]
        tile = tl.load(x + offsets, mask=area, other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(gradient), tile, total, input_precision="ieee")
        found = tl.zeros((BT, BD), tl.float32)
        if BASE:
            found += tl.load(base + offsets, mask=area, other=0.0).to(tl.float32)
        found = tl.dot(gradient, weight, found, input_precision="ieee")
        tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask=area)
    part = drouter + tl.program_id(1).to(tl.int64) * E * D
    places = number[:, None] * D + inner[None, :]
    tl.store(part + places, total, mask=(number < E)[:, None] & within[None, :])


@operator("route")
def _route(
    x: torch.Tensor, router: torch.Tensor, mask: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (tokens, width), experts = x.shape, router.shape[0]
    programs = triton.cdiv(tokens, ROWS)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    logits, probabilities = make(tokens, experts), make(tokens, experts)
    chosen, weights = make(tokens, top_k, dtype=torch.int64), make(tokens, top_k)
    report = make(programs, 3, experts)
    with on_device_of(x):
        start(
            router_kernel,
            (programs,),
            x,
            router,
            mask,
            logits,
            probabilities,
            chosen,
            weights,
            report,
            tokens,
            width,
            E=experts,
            EXPERTS=max(16, triton.next_power_of_2(experts)),
            K=top_k,
            SLOTS=triton.next_power_of_2(top_k),
            MASKED=mask is not None,
            BT=ROWS,
            BD=64,
            num_warps=4,
            num_stages=3,
        )
    return logits, probabilities, chosen, weights, report


@operator("route_backward")
def _route_backward(
    x: torch.Tensor,
    router: torch.Tensor,
    mask: torch.Tensor | None,
    probabilities: torch.Tensor,
    chosen: torch.Tensor,
    dlogits: torch.Tensor | None,
    dprobabilities: torch.Tensor | None,
    dweights: torch.Tensor | None,
    dreport: torch.Tensor | None,
    base: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx (T, D), drouter (splits, E, D) float32 in parts); base: added to dx."""
    (tokens, width), experts = x.shape, router.shape[0]
    tiles = triton.cdiv(tokens, BACK_ROWS)
    # The parts are written and read once: no more of them than fill a device.
    steps = triton.cdiv(tiles, 2 if INTERPRETED else 32)
    splits = triton.cdiv(tiles, steps)
    dx = torch.empty_like(x)
    parts = torch.empty((splits, experts, width), dtype=torch.float32, device=x.device)
    inner = 64
    with on_device_of(x):
        start(
            router_backward_kernel,
            (triton.cdiv(width, inner), splits),
            x,
            router,
            mask,
            probabilities,
            chosen,
            dlogits,
            dprobabilities,
            dweights,
            dreport,
            base,
            dx,
            parts,
            tokens,
            width,
            steps,
            0 if dreport is None else dreport.stride(0),
            E=experts,
            EXPERTS=max(16, triton.next_power_of_2(experts)),
            K=chosen.shape[1],
            ROWS=ROWS,
            MASKED=mask is not None,
            LOGITS=dlogits is not None,
            PROBABILITIES=dprobabilities is not None,
            WEIGHTS=dweights is not None,
            REPORT=dreport is not None,
            BASE=base is not None,
            BT=BACK_ROWS,
            BD=inner,
            num_warps=4 if experts <= 16 else 8,
            num_stages=1,
        )
    return dx, parts


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, router, mask, top_k):
        logits, probabilities, chosen, weights, report = _route(x, router, mask, top_k)
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, router, mask, probabilities, chosen)
        return logits, probabilities, chosen, weights, report, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits, dprobabilities, _, dweights, dreport, base):
        x, router, mask, probabilities, chosen = ctx.saved_tensors
        upstream = [dlogits, dprobabilities, dweights]
        if dreport is not None and dreport.stride()[1:] != (router.shape[0], 1):
            dreport = dreport.contiguous()
        if dreport is None and all(gradient is None for gradient in upstream):
            return base, None, None, None
        upstream = [None if one is None else one.contiguous() for one in upstream]
        base = None if base is None else base.contiguous()
        dx, parts = _route_backward(
            x, router, mask, probabilities, chosen, *upstream, dreport, base
        )
        return dx, parts.sum(dim=0).to(router.dtype), None, None


def route_triton(x: Tensor, router: Tensor, top_k: int, mask: Tensor | None = None) -> Routing:
    """Return `route`, fused: x (T, D); router (E, D). Equal logits go to the lowest expert.

    mask: (T,) bool, which rows the router's report counts, None for all; the report stands in
    `extra`, and `rows` is x: whoever goes on from there leaves it to the router's backward pass to
    add both gradients. What the kernel does not take (float64, more than 64 experts, no tokens, a
    device without Triton) is left to `route`.
    """
    on_device = INTERPRETED or x.is_cuda
    known = {torch.float32, torch.float16, torch.bfloat16}
    if (
        not on_device
        or not {x.dtype, router.dtype} <= known
        or router.shape[0] > MAX_EXPERTS
        or len(x) == 0
    ):
        return route(x, router, top_k)
    made = _Route.apply(x.contiguous(), router.contiguous(), mask, top_k)
    return Routing(*made[:4], {"report": made[4]}, made[5])
