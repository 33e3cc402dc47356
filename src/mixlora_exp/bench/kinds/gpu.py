"""`kind=gpu`: everything that needs a GPU, in one command and at most eight minutes.

Checks each kernel against float64 and in a CUDA graph, then measures Tables 6 and 7 at full depth
on random weights. Needs nothing but PyTorch, Triton, transformers, PEFT and the files of this
repository.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mixlora_exp.bench.checks import CASES, capture_error, kernel_errors, router_errors
from mixlora_exp.bench.kinds.steps import benchmark
from mixlora_exp.bench.options import BenchOptions, StepOptions
from mixlora_exp.bench.report import markdown
from mixlora_exp.bench.rows import ROWS
from mixlora_exp.bench.runner import Kind, machine_slug, say
from mixlora_exp.errors import UserError

LIMIT_S = 8 * 60
# Share of the limit by which each model's rounds end. Its warm-up is not cut short.
MODELS = (
    ("llama2_7b", 4, 512, 0.45),
    ("gemma_2b", 4, 512, 0.65),
    ("smollm2_135m", 8, 128, 0.78),
    ("llama3_8b", 4, 512, 0.95),
)


# The rows that the bars are about come first, so that they have the memory if not all fit.
FIRST = (
    "lora_peft",
    "lora_peft_again",
    "mixlora_triton",
    "mixdora_triton",
    "dora",
    "mixlora",
    "mixdora",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _guarded(what: dict[str, Any], check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a check, or why it could not be carried out: one failure hides no other."""
    try:
        return {**what, **check()}
    except Exception as error:  # Triton's own errors have no common class.
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return {**what, "passed": False, "error": reason}


def _checks() -> list[dict[str, Any]]:
    found = []
    for dtype in DTYPES:
        for name, case in CASES.items():
            for kernel in ("triton", "exact"):
                what = {"case": name, "kernel": kernel, "dtype": str(dtype)}
                found.append(
                    _guarded(
                        what, lambda k=kernel, c=case, d=dtype: kernel_errors(k, c, d, "cuda", 1)
                    )
                )
            what = {"case": name, "kernel": "triton router", "dtype": str(dtype)}
            found.append(_guarded(what, partial(router_errors, "triton", case, dtype, "cuda")))
    for kernel in ("exact", "triton"):
        for dora in (False, True):
            error = capture_error(kernel, dora)
            what = {"case": "CUDA graph", "kernel": kernel, "dora": dora}
            found.append({**what, "error": error, "passed": error is None})
    return found


@dataclass(slots=True, kw_only=True)
class GpuOptions(BenchOptions):
    models: list[str] = field(default_factory=lambda: [name for name, *_ in MODELS])


def measure(options: GpuOptions) -> Iterator[dict[str, Any]]:
    """The checks first, then model by model; what does not fit into the time is named."""
    known = [name for name, *_ in MODELS]
    for name in options.models:
        if name not in known:
            raise UserError(f"models={name} is not in this suite: choose from {', '.join(known)}")
    if not torch.cuda.is_available():
        raise UserError(
            "kind=gpu needs a CUDA GPU and this machine has none; the Triton kernels are checked "
            "by their interpreter in `make test`, and `make bench` measures the CPU"
        )
    start = time.monotonic()
    record: dict[str, Any] = {"checks": _checks(), "benchmarks": [], "skipped": {}}
    for check in record["checks"]:
        if not check["passed"]:
            say(f"FAILED {check}")

    def so_far() -> dict[str, Any]:
        return {**record, "seconds": round(time.monotonic() - start, 1)}

    yield so_far()
    rows = [*FIRST, *(row for row in ROWS if row not in FIRST)]
    for model, batch, length, share in MODELS:
        if model not in options.models:
            continue
        if time.monotonic() - start > share * LIMIT_S:
            record["skipped"][model] = "no time left"
            continue
        say(model)
        config = StepOptions(model=model, batch=batch, length=length, rounds=20, rows=rows)
        try:
            record["benchmarks"].append(benchmark(config, deadline=start + share * LIMIT_S))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            record["skipped"][model] = reason
        yield so_far()
        torch.cuda.empty_cache()
    for model, reason in record["skipped"].items():
        say(f"not measured: {model}: {reason}")
    yield so_far()


def _markdown(record: Mapping[str, Any]) -> str:
    origin = record["provenance"]
    return "\n".join(markdown({**one, "provenance": origin}) for one in record["benchmarks"])


KIND = Kind(options=GpuOptions, measure=measure, name=machine_slug, markdown=_markdown)
