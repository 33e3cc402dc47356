"""`kind=forms`: the two forms of the exact kernel on this CPU, tokens grouped by expert or experts
stacked.

Times one block's forward pass (no gradient), both forms in turn, for one to 1,024 tokens at the
widths of SmolLM2 135M and LLaMA-2 7B. `kernel=exact` takes the grouped form on a CPU by these
figures.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from mixlora_exp.bench.options import BenchOptions
from mixlora_exp.bench.runner import Kind, echo
from mixlora_exp.kernels import Experts, FeedForward, FrozenLinear, Projection, route
from mixlora_exp.kernels.mixlora.dense import dense_stage
from mixlora_exp.kernels.mixlora.grouped import grouped_stage
from mixlora_exp.kernels.mixlora.stage import run_stage

FORMS = {"dense": partial(run_stage, dense_stage), "grouped": partial(run_stage, grouped_stage)}


@dataclass(slots=True, kw_only=True)
class FormOptions(BenchOptions):
    """Settings of `kind=forms`. tokens: T of each block; widths: pairs (D, F); experts, top_k,
    rank: E, K, R; seconds: how long each block is measured at least."""

    tokens: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256, 1024])
    widths: list[list[int]] = field(default_factory=lambda: [[576, 1536], [4096, 11008]])
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    seconds: float = 1.0


def _block(settings: FormOptions, d: int, f: int, dtype: torch.dtype, dora: bool) -> FeedForward:
    projections = []
    for size_out, size_in in ((f, d), (f, d), (d, f)):
        magnitude = norm = None
        if dora:
            magnitude, norm = (torch.rand(settings.experts, size_out) + 1 for _ in range(2))
        a = torch.randn(settings.experts, settings.rank, size_in) * size_in**-0.5
        b = torch.randn(settings.experts, size_out, settings.rank) * 0.1
        weight = (torch.randn(size_out, size_in) * size_in**-0.5).to(dtype)
        projections.append(Projection(FrozenLinear(weight), Experts(a, b, 2.0, magnitude, norm)))
    return FeedForward(*projections, "silu")


@torch.no_grad()
def _times(settings: FormOptions, block: FeedForward, x: torch.Tensor) -> dict[str, list[float]]:
    """Return seconds of each pass, the forms in turn, for at least three rounds."""
    routing = route(x, torch.randn(settings.experts, x.shape[1]) * 0.05, settings.top_k)
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for form in FORMS.values():
        form(x, routing, block)
    end = time.perf_counter() + settings.seconds
    while time.perf_counter() < end or len(found["dense"]) < 3:
        for name, form in FORMS.items():
            start = time.perf_counter()
            form(x, routing, block)
            found[name].append(time.perf_counter() - start)
    return found


def _row(options: FormOptions, shape: list[int], dtype: torch.dtype, dora: bool, tokens: int):
    hidden, inner = shape
    block = _block(options, hidden, inner, dtype, dora)
    times = _times(options, block, torch.randn(tokens, hidden).to(dtype))
    middle = {f"{name}_ms": round(1e3 * statistics.median(t), 3) for name, t in times.items()}
    ratios = [a / b for a, b in zip(times["dense"], times["grouped"], strict=True)]
    return {
        "hidden": hidden, "inner": inner, "dtype": str(dtype).removeprefix("torch."), "dora": dora,
        "tokens": tokens, "rounds": len(ratios), **middle,
        "dense_over_grouped": round(statistics.median(ratios), 3),
    }  # fmt: skip


def measure(options: FormOptions) -> Iterator[dict[str, Any]]:
    """Yield the record of the forward and backward times of the exact kernel's two forms, dense and
    grouped, on a CPU."""
    torch.manual_seed(0)
    dtypes, doras = (torch.bfloat16, torch.float32), (False, True)
    rows = []
    for cell in itertools.product(options.widths, dtypes, doras, options.tokens):
        rows.append(_row(options, *cell))
        echo(" ".join(f"{name}={value}" for name, value in rows[-1].items()))
    yield {"config": asdict(options), "threads": torch.get_num_threads(), "forms": rows}


KIND = Kind(options=FormOptions, measure=measure, name=lambda record: "forms-cpu")
