"""`kind=gpu`: everything that needs a GPU, in one command and at most four minutes.

Checks each kernel against float64 and in a CUDA graph, then measures Tables 6 and 7 at full depth
on random weights, what matters most first: of each model times, then kernels and memory. Needs
nothing but PyTorch, Triton, transformers, PEFT and the files of this repository.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixlora_exp.bench.check_pool import all_checks, failure, results
from mixlora_exp.bench.kinds.steps import benchmark_parts, check
from mixlora_exp.bench.options import BenchOptions, StepOptions
from mixlora_exp.bench.report import kernel_table, markdown
from mixlora_exp.bench.runner import Kind, echo, machine_slug
from mixlora_exp.config.paths import ROOT
from mixlora_exp.errors import UserError
from mixlora_exp.system.device import hardware_names

CHECKS_UNTIL = 0.2
"""Share of the time by which the checks end."""
MODELS = {
    "llama2_7b": (4, 512, 0.60, 0.66),
    "gemma_2b": (4, 512, 0.78, 0.81),
    "smollm2_135m": (8, 128, 0.88, 0.90),
    "llama3_8b": (4, 512, 0.99, 1.0),
}
"""Batch, length, and the shares of the time by which a model's rounds and its details end. A row's
first step is not cut short."""
GOAL_ROWS = (
    "lora_peft", "floor", "mixlora_triton", "mixlora_triton_graph", "floor_graph",
    "mixlora_triton_compiled", "floor_compiled", "mixdora_triton", "lora_triton", "dora_triton",
    "lora_triton_graph", "dora_triton_graph", "mixdora_triton_graph", "lora_peft_again",
    "dora_peft", "lora_peft_compiled", "lora_peft_bf16", "lora_peft_no_autocast", "lora_axolotl",
    "mixlora", "lora",
)  # fmt: skip
"""The rows that the goals are about come first."""
EVERYWHERE = (
    "lora_peft", "floor", "mixlora_triton", "mixdora_triton", "lora_triton", "dora_triton",
)  # fmt: skip
"""The rows of the models after the first: a compiler takes a minute for the compiled ones."""


@dataclass(slots=True, kw_only=True)
class GpuOptions(BenchOptions):
    """Settings of `kind=gpu`. `minutes`: time for all measurements; what does not fit is left out,
    with a line for each. `checks`: compare the kernels with float64. `rows`, `liger`: as in
    `kind=steps`. `tests`: then run the tests of the Triton kernels, for as long again; their log
    lies beside the record, which names the tests that failed."""

    minutes: float = 4
    checks: bool = True
    models: list[str] = field(default_factory=lambda: list(MODELS))
    rows: list[str] = field(default_factory=lambda: list(GOAL_ROWS))
    liger: bool = False
    tests: bool = False


def steps_of(options: GpuOptions, model: str) -> StepOptions:
    """Return settings of the step benchmark of one model."""
    batch, length, *_ = MODELS[model]
    rows = options.rows
    if model != "llama2_7b":
        rows = [name for name in rows if name in EVERYWHERE]
    return StepOptions(
        model=model, batch=batch, length=length, rounds=20, rows=rows, liger=options.liger
    )


def measure(options: GpuOptions) -> Iterator[dict[str, Any]]:
    """Yield the checks first, then model by model; what does not fit into the time is named.

    Raises:
        UserError: a setting is not valid, or there is no CUDA GPU.
    """
    for name in options.models:
        if name not in MODELS:
            raise UserError(f"models={name} is not in this suite: choose from {', '.join(MODELS)}")
    if options.minutes <= 0:
        raise UserError(f"minutes={options.minutes} must be above 0")
    if not torch.cuda.is_available():
        raise UserError(
            "kind=gpu needs a CUDA GPU and this machine has none; the Triton kernels are checked "
            "by their interpreter in `make test`, and `make bench` measures the CPU"
        )
    for name in options.models:
        check(steps_of(options, name))
    yield from suite(options)


def suite(options: GpuOptions) -> Iterator[dict[str, Any]]:
    """Yield the record after each part."""
    start, limit = time.monotonic(), 60 * options.minutes
    record: dict[str, Any] = {
        "minutes": options.minutes, "checks": [], "failed": [], "benchmarks": [], "skipped": {},
    }  # fmt: skip

    def so_far(*benchmarks: Mapping[str, Any]) -> dict[str, Any]:
        seconds = round(time.monotonic() - start, 1)
        return {**record, "benchmarks": [*record["benchmarks"], *benchmarks], "seconds": seconds}

    if options.checks:
        carry_out_checks(record, start + CHECKS_UNTIL * limit)
        yield so_far()
    for model in options.models:
        *_, rounds_until, details_until = MODELS[model]
        if time.monotonic() > start + rounds_until * limit:
            skip(record, model, "no time left")
            continue
        echo(model)
        parts = benchmark_parts(
            steps_of(options, model),
            deadline=start + rounds_until * limit,
            details_until=start + details_until * limit,
        )
        found = None
        try:
            for found in parts:
                yield so_far(found)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            skip(record, model if found is None else f"{model}, details", text)
        if found is not None:
            record["benchmarks"].append(found)
        del parts
        gc.collect()
        torch.cuda.empty_cache()
    if options.tests:
        run_tests(record, options, 60 * options.minutes)
    yield so_far()


def skip(record: dict[str, Any], what: str, reason: str) -> None:
    """Record and print that something was not measured."""
    record["skipped"][what] = reason
    echo(f"not measured: {what}: {reason}")


def carry_out_checks(record: dict[str, Any], deadline: float) -> None:
    """Fill `checks`, and the names of those that fail into `failed`."""
    tasks = all_checks()
    for found in results(tasks, max(1, min(12, (os.cpu_count() or 2) - 2)), deadline):
        record["checks"].append(found)
        if not found["passed"]:
            record["failed"].append(failure(found))
            echo(f"FAILED {record['failed'][-1]}")
    done = {(c["case"], c["kernel"], c["dtype"]) for c in record["checks"]}
    left = [t.described() for t in tasks if tuple(t.described().values()) not in done]
    echo(f"{len(done) - len(record['failed'])} of {len(tasks)} checks passed")
    if left:
        names = "; ".join(", ".join(one.values()) for one in left)
        skip(record, "checks", f"{len(left)} of {len(tasks)}, no time left: {names}")


def run_tests(record: dict[str, Any], options: GpuOptions, limit: float) -> None:
    """Run the tests of the Triton kernels by pytest; `tests` in the record names the log and those
    that failed."""
    name = options.name or machine_slug({"provenance": {"hardware": hardware_names()}})
    log = ROOT / options.output / f"{name}-tests.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(str(p) for p in (ROOT / "tests" / "kernels").glob("test_triton*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *files]
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=stream, stderr=stream, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
            skip(record, "tests", "not finished: no time left")
    failed = failed_tests(log)
    record["tests"] = {"log": log.name, "exit_code": code, "failed": failed}
    record["failed"] += failed or ([f"pytest: exit code {code}, see {log.name}"] if code else [])


def failed_tests(log: Path) -> list[str]:
    """Return the names in pytest's summary."""
    lines = log.read_text(errors="replace").splitlines()
    words = [line.split(" - ")[0].split(" ", 1) for line in lines]
    return [word[1] for word in words if word[0] in ("FAILED", "ERROR") and len(word) == 2]


def _markdown(record: Mapping[str, Any]) -> str:
    origin, parts = record["provenance"], []
    if "failed" in record:
        passed = sum(one["passed"] for one in record["checks"])
        parts.append(f"{passed} of {len(record['checks'])} checks passed.\n")
        parts.append("".join(f"- failed: {name}\n" for name in record["failed"]))
        skipped = record["skipped"].items()
        parts.append("".join(f"- not measured: {what}: {why}\n" for what, why in skipped))
    for one in record["benchmarks"]:
        parts.append(markdown({**one, "provenance": origin}))
        parts.append(kernel_table(one, "mixlora_triton"))
    return "\n".join(part for part in parts if part)


KIND = Kind(options=GpuOptions, measure=measure, name=machine_slug, markdown=_markdown)
