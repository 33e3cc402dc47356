"""Checks kernels against float64 on this machine, and whether a CUDA graph can capture them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.kernels import (
    KERNELS,
    ROLES,
    Experts,
    FeedForward,
    FrozenLinear,
    Projection,
    Routing,
    draw_mask,
    make_router,
    route,
)


def router_of(kernel: str) -> Callable[[Tensor, Tensor, int], Routing]:
    """Return the function that routes tokens x (T, D) by a router (E, D) for a kernel: fused in one
    launch for a kernel that is made for a device."""

    def run(x: Tensor, router: Tensor, top_k: int) -> Routing:
        made = make_router("top_k", {"num_experts": len(router), "top_k": top_k}, {})
        return made.route(x, {"": router}, fused=KERNELS[kernel].device is not None)

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A block to check: T tokens, D hidden, F inner size, E experts, K per token, rank R."""

    tokens: int = 300
    hidden: int = 256
    inner: int = 688
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    dora: bool = False
    biased: bool = False
    activation: str = "silu"
    dropout: float = 0.05
    routes: str = "drawn"
    """`drawn`; `without the last expert`; `first experts only`, the same K for every token."""


CASES = {
    "paper's setting": Case(),
    "one token": Case(tokens=1),
    "odd sizes": Case(tokens=77, hidden=131, inner=205),
    "K=1": Case(top_k=1),
    "K=E=5, no power of two": Case(experts=5, top_k=5),
    "rank 10": Case(rank=10),
    "rank 32": Case(rank=32),
    "GeGLU": Case(activation="gelu_tanh"),
    "an expert without tokens": Case(routes="without the last expert"),
    "all tokens to the same experts": Case(routes="first experts only"),
    "MixDoRA": Case(dora=True),
    "biases": Case(biased=True),
    "MixDoRA, biases": Case(dora=True, biased=True),
    "MixDoRA, GeGLU, no dropout": Case(dora=True, activation="gelu_tanh", dropout=0.0),
}


def drawn_by(seed: int, device: str) -> Callable[..., Tensor]:
    """Return a function of a shape and `scale` that draws values in float64 which fit in bf16, so
    that no input is rounded on its way."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator) * scale
        return made.bfloat16().double().to(device)

    return draw


def _values(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Return the inputs and weights of a block, and an upstream gradient, by name."""
    draw = drawn_by(seed, device)
    values = {
        "x": draw(case.tokens, case.hidden, scale=1.0),
        "router": draw(case.experts, case.hidden, scale=case.hidden**-0.5),
        "upstream": draw(case.tokens, case.hidden, scale=1.0),
    }
    if case.routes != "drawn":
        # A feature that is 1 everywhere decides.
        values["x"][:, 0] = 1.0
        unwanted = slice(-1, None) if case.routes.startswith("without") else slice(case.top_k, None)
        values["router"][unwanted, 0] = -64.0
    for role in ROLES:
        fan_in, fan_out = case.hidden, case.inner
        if role == "down":
            fan_in, fan_out = fan_out, fan_in
        values[f"{role}.weight"] = draw(fan_out, fan_in, scale=fan_in**-0.5)
        values[f"{role}.a"] = draw(case.experts, case.rank, fan_in, scale=fan_in**-0.5)
        values[f"{role}.b"] = draw(case.experts, fan_out, case.rank, scale=case.rank**-0.5)
        if case.dora:
            values[f"{role}.magnitude"] = draw(case.experts, fan_out, scale=0.3) + 1.5
        if case.biased:
            values[f"{role}.bias"] = draw(fan_out, scale=0.5)
    return values


def _run(
    kernel: str, case: Case, values: dict[str, Tensor], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Return the output and gradients by name, in float64. Adapters are in float32 or better."""
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    leaves = {}
    for name, value in values.items():
        if name != "upstream" and not name.endswith(("weight", "bias")):
            kind = dtype if name == "x" else adapter_dtype
            leaves[name] = value.to(kind).detach().requires_grad_()
    device = values["x"].device
    projections = []
    for role in ROLES:
        weight = values[f"{role}.weight"]
        norm = torch.ones(values[f"{role}.b"].shape[:2], device=device, dtype=adapter_dtype)
        experts = Experts(
            leaves[f"{role}.a"],
            leaves[f"{role}.b"],
            2.0,
            leaves.get(f"{role}.magnitude"),
            norm if case.dora else None,
        )
        bias = values[f"{role}.bias"].to(dtype) if case.biased else None
        projections.append(Projection(FrozenLinear(weight.to(dtype), bias), experts))
    torch.manual_seed(seed)
    masks = [
        draw_mask((case.tokens, width), case.dropout, device) for width in (case.hidden, case.inner)
    ]
    block = FeedForward(*projections, case.activation, case.dropout, *masks)
    # Routed in float64: a near tie must not send a token elsewhere.
    routing = route(values["x"], leaves["router"].double(), case.top_k)
    y = KERNELS[kernel](leaves["x"], routing, block)
    y.backward(values["upstream"].to(dtype))
    return {"y": y.detach().double()} | {n: leaf.grad.double() for n, leaf in leaves.items()}


def kernel_errors(
    kernel: str, case: Case, dtype: torch.dtype, device: str, seeds: int = 3
) -> dict[str, Any]:
    """Mean relative errors against the reference in float64, of `kernel` and of the reference in
    `dtype`; `worst_ratio` is the largest of the first over the second among output and gradients,
    and `passed` tells whether none is above twice the reference's (with half a rounding to
    spare)."""
    errors = Errors(seeds)
    for seed in range(seeds):
        values = _values(case, device, seed)
        truth = _run("reference", case, values, torch.float64, seed)
        both = [_run(name, case, values, dtype, seed) for name in (kernel, "reference")]
        if case.top_k == 1:
            # With one expert per token its weight is 1: the router's gradient is rounding.
            truth.pop("router")
        errors.add(truth, *both)
    return {"kernel": kernel, **asdict(case), **judged(errors.mean, dtype)}


class Errors:
    """Mean relative errors over some seeds, by tensor: of a kernel, and of the reference in its
    dtype."""

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.mean: dict[str, list[float]] = {}

    def add(self, truth: Mapping[str, Tensor], *both: Mapping[str, Tensor]) -> None:
        """Add the errors of one seed against `truth` in float64, of the tensors that it has."""
        for i, found in enumerate(both):
            for key, wanted in truth.items():
                error = float((found[key] - wanted).norm() / wanted.norm().clamp(min=1e-30))
                self.mean.setdefault(key, [0.0, 0.0])[i] += error / self.seeds


def judged(errors: Mapping[str, Sequence[float]], dtype: torch.dtype) -> dict[str, Any]:
    """Return the verdict on (error, the reference's error in `dtype`) by tensor: `worst_ratio`,
    `worst` and `passed` of `kernel_errors`."""
    floor = torch.finfo(dtype).eps / 2
    ratios = {key: error / (allowed + floor) for key, (error, allowed) in errors.items()}
    worst = max(ratios, key=ratios.get)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "worst_ratio": round(ratios[worst], 3),
        "worst": worst,
        "passed": all(error <= 2 * allowed + floor for error, allowed in errors.values()),
    }


def router_errors(kernel: str, case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return the router of `kernel` against `route` in float64: experts that differ where no tie is
    near, and the largest errors of the weights and of the gradients of x and the router."""
    values = _values(case, device, 0)
    upstream = torch.linspace(0.5, 1.5, case.top_k, dtype=torch.float64, device=device)
    made = {}
    for name, kind in ((kernel, dtype), ("reference", torch.float64)):
        x = values["x"].to(kind).detach().requires_grad_()
        router = values["router"].to(torch.promote_types(kind, torch.float32))
        router = router.detach().requires_grad_()
        routing = router_of(name)(x, router, case.top_k)
        (routing.weights.double() * upstream).sum().backward()
        gradients = (x.grad.double(), router.grad.double())
        made[name] = (routing.experts, routing.weights.detach().double(), *gradients)
    logits = values["x"] @ values["router"].T
    # The order of those chosen, and the border to the next.
    ranked = logits.topk(min(case.top_k + 1, case.experts), dim=-1).values
    sure = (ranked[:, :-1] - ranked[:, 1:]).min(dim=-1).values > 0.05
    found, truth = made[kernel], made["reference"]
    wrong = int((found[0][sure] != truth[0][sure]).any(dim=-1).sum())
    errors = {
        name: float((a - b)[sure].abs().max()) if name != "router" else float((a - b).abs().max())
        for name, a, b in zip(("weights", "x", "router"), found[1:], truth[1:], strict=True)
        if bool(sure.any())
    }
    scale = max(float(t.abs().max()) for t in truth[1:])
    bound = 8 * torch.finfo(dtype).eps * max(1.0, scale) * case.tokens**0.5
    return {
        "kernel": f"{kernel} router",
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(case),
        "experts_wrong": wrong,
        "errors": errors,
        # A near tie moves the router's gradient by a whole token.
        "passed": wrong == 0
        and all(e <= bound for n, e in errors.items() if n != "router" or bool(sure.all())),
    }


def capture_error(kernel: str, dora: bool) -> str | None:
    """Capture a forward and backward pass in a CUDA graph, the router included, and replay it on
    other values; the reason why this fails or gives another result than without a graph, else None.
    What reads something back to the host cannot be captured."""
    case = Case(dora=dora, dropout=0.0)
    values = _values(case, "cuda", 0)
    static = {name: value.bfloat16() for name, value in values.items()}
    static = {
        name: value.float() if name not in ("x", "upstream") and "weight" not in name else value
        for name, value in static.items()
    }

    def step() -> Tensor:
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in static.items()
            if name != "upstream" and "weight" not in name
        }
        projections = []
        for role in ROLES:
            norm = torch.ones_like(static[f"{role}.b"][..., 0])
            magnitude = leaves.get(f"{role}.magnitude")
            a, b = leaves[f"{role}.a"], leaves[f"{role}.b"]
            experts = Experts(a, b, 2.0, magnitude, norm if dora else None)
            projections.append(Projection(FrozenLinear(static[f"{role}.weight"]), experts))
        block = FeedForward(*projections, case.activation)
        routing = router_of(kernel)(leaves["x"], leaves["router"], case.top_k)
        y = KERNELS[kernel](leaves["x"], routing, block)
        grads = torch.autograd.grad(y, list(leaves.values()), static["upstream"])
        return torch.cat([tensor.detach().flatten().float() for tensor in (y, *grads)])

    return _captured(step, static["x"])


def _captured(step: Callable[[], Tensor], x: Tensor) -> str | None:
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        expected = step()
    except Exception as error:  # Triton's own errors have no common class.
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    # Sums by atomic additions differ in their last bits.
    close = torch.allclose(result, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    return None if close else "the replay gives another result"
