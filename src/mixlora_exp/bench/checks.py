"""Kernels against float64 on the machine at hand, and whether they can run without the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.kernels import (
    KERNELS,
    Experts,
    FeedForward,
    Projection,
    draw_mask,
    route,
)

__all__ = ["CASES", "Case", "capture_error", "kernel_errors"]

ROLES = ("gate", "up", "down")


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
    activation: str = "silu"
    dropout: float = 0.05


CASES = {
    "paper's setting": Case(),
    "one token": Case(tokens=1),
    "odd sizes": Case(tokens=77, hidden=131, inner=205),
    "K=1": Case(top_k=1),
    "K=E=5, no power of two": Case(experts=5, top_k=5),
    "rank 10": Case(rank=10),
    "rank 32": Case(rank=32),
    "GeGLU": Case(activation="gelu_tanh"),
    "MixDoRA": Case(dora=True),
    "MixDoRA, GeGLU, no dropout": Case(dora=True, activation="gelu_tanh", dropout=0.0),
}


def _values(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Random values in float64 that fit in bf16, so that no input is rounded on its way."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        made = torch.randn(*shape, generator=generator) * scale
        return made.bfloat16().double().to(device)

    values = {
        "x": draw(case.tokens, case.hidden, scale=1.0),
        "router": draw(case.experts, case.hidden, scale=case.hidden**-0.5),
        "upstream": draw(case.tokens, case.hidden, scale=1.0),
    }
    for role in ROLES:
        fan_in, fan_out = case.hidden, case.inner
        if role == "down":
            fan_in, fan_out = fan_out, fan_in
        values[f"{role}.weight"] = draw(fan_out, fan_in, scale=fan_in**-0.5)
        values[f"{role}.a"] = draw(case.experts, case.rank, fan_in, scale=fan_in**-0.5)
        values[f"{role}.b"] = draw(case.experts, fan_out, case.rank, scale=case.rank**-0.5)
        if case.dora:
            values[f"{role}.magnitude"] = draw(case.experts, fan_out, scale=0.3) + 1.5
    return values


def _run(
    kernel: str, case: Case, values: dict[str, Tensor], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Output and gradients by name, in float64. Adapters are in float32 or better."""
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    leaves = {}
    for name, value in values.items():
        if name != "upstream" and not name.endswith("weight"):
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
        projections.append(Projection(weight.to(dtype), experts))
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
    sums: dict[str, list[float]] = {}
    for seed in range(seeds):
        values = _values(case, device, seed)
        truth = _run("reference", case, values, torch.float64, seed)
        for i, name in enumerate((kernel, "reference")):
            found = _run(name, case, values, dtype, seed)
            for key, value in found.items():
                # With one expert per token its weight is 1: the router's gradient is rounding.
                if key == "router" and case.top_k == 1:
                    continue
                error = float((value - truth[key]).norm() / truth[key].norm().clamp(min=1e-30))
                sums.setdefault(key, [0.0, 0.0])[i] += error / seeds
    floor = torch.finfo(dtype).eps / 2
    ratios = {key: error / (allowed + floor) for key, (error, allowed) in sums.items()}
    worst = max(ratios, key=ratios.get)
    passed = all(error <= 2 * allowed + floor for error, allowed in sums.values())
    return {
        "kernel": kernel,
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(case),
        "worst_ratio": round(ratios[worst], 3),
        "worst": worst,
        "passed": passed,
    }


def capture_error(kernel: str, dora: bool) -> str | None:
    """Capture a forward and backward pass in a CUDA graph and replay it on other values; the
    reason why this fails or gives another result than without a graph, else None. What reads
    something back to the host cannot be captured."""
    case = Case(dora=dora, dropout=0.0)
    values = _values(case, "cuda", 0)
    static = {name: value.bfloat16() for name, value in values.items()}
    static = {
        name: value.float() if name not in ("x", "upstream") and "weight" not in name else value
        for name, value in static.items()
    }

    def step() -> Tensor:
        leaf = static["x"].detach().requires_grad_()
        projections = []
        for role in ROLES:
            norm = torch.ones_like(static[f"{role}.b"][..., 0])
            magnitude = static.get(f"{role}.magnitude")
            a, b = static[f"{role}.a"], static[f"{role}.b"]
            experts = Experts(a, b, 2.0, magnitude, norm if dora else None)
            projections.append(Projection(static[f"{role}.weight"], experts))
        block = FeedForward(*projections, case.activation)
        y = KERNELS[kernel](leaf, route(leaf, static["router"], case.top_k), block)
        (grad,) = torch.autograd.grad(y, leaf, static["upstream"])
        return torch.cat([y.detach(), grad])

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
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None if torch.equal(result, expected) else "the replay gives another result"
