"""The two forms of the exact kernel on this CPU: tokens grouped by expert, or experts stacked.

`python scripts/bench_forms.py` times one block's forward pass (no gradient), both forms in turn,
for one to 1,024 tokens at the widths of SmolLM2 135M and LLaMA-2 7B. `mixlora_exact` takes the
grouped form on a CPU by these figures. Writes `results/bench/forms-cpu.json`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from mixlora_exp.config import options
from mixlora_exp.kernels import Experts, FeedForward, Projection, route
from mixlora_exp.kernels.mixlora.exact import mixlora_exact_dense, mixlora_exact_grouped
from mixlora_exp.records.record import finish_record, provenance, write_json
from mixlora_exp.system.guarded import guarded

ROOT = Path(__file__).resolve().parents[1]
FORMS = {"dense": mixlora_exact_dense, "grouped": mixlora_exact_grouped}


@dataclass(slots=True, kw_only=True)
class Settings:
    tokens: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256, 1024])
    widths: list[list[int]] = field(default_factory=lambda: [[576, 1536], [4096, 11008]])
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    seconds: float = 1.0
    output: str = "results/bench"


def _block(settings: Settings, d: int, f: int, dtype: torch.dtype, dora: bool) -> FeedForward:
    projections = []
    for size_out, size_in in ((f, d), (f, d), (d, f)):
        magnitude = norm = None
        if dora:
            magnitude, norm = (torch.rand(settings.experts, size_out) + 1 for _ in range(2))
        a = torch.randn(settings.experts, settings.rank, size_in) * size_in**-0.5
        b = torch.randn(settings.experts, size_out, settings.rank) * 0.1
        weight = (torch.randn(size_out, size_in) * size_in**-0.5).to(dtype)
        projections.append(Projection(weight, Experts(a, b, 2.0, magnitude, norm)))
    return FeedForward(*projections, "silu")


@torch.no_grad()
def _times(settings: Settings, block: FeedForward, x: torch.Tensor) -> dict[str, list[float]]:
    """Seconds of each pass, the forms in turn, for at least three rounds."""
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


def run(arguments: Sequence[str]) -> None:
    settings = options(Settings, arguments)
    torch.manual_seed(0)
    rows = []
    for d, f in settings.widths:
        for dtype in (torch.bfloat16, torch.float32):
            for dora in (False, True):
                block = _block(settings, d, f, dtype, dora)
                for tokens in settings.tokens:
                    times = _times(settings, block, torch.randn(tokens, d).to(dtype))
                    middle = {n: statistics.median(v) for n, v in times.items()}
                    ratios = [a / b for a, b in zip(times["dense"], times["grouped"], strict=True)]
                    row = {
                        "hidden": d, "inner": f, "dtype": str(dtype).removeprefix("torch."),
                        "dora": dora, "tokens": tokens, "rounds": len(ratios),
                        **{f"{n}_ms": round(1e3 * v, 3) for n, v in middle.items()},
                        "dense_over_grouped": round(statistics.median(ratios), 3),
                    }  # fmt: skip
                    rows.append(row)
                    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    record = {
        "config": asdict(settings),
        "threads": torch.get_num_threads(),
        "forms": rows,
        "provenance": provenance(ROOT),
    }
    write_json(Path(settings.output) / "forms-cpu.json", finish_record(record))


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
