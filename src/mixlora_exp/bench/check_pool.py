"""The checks of `bench.checks` by several processes at once: most of their time is compilation."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixlora_exp.bench.checks import CASES, capture_error, kernel_errors, router_errors
from mixlora_exp.bench.linear_checks import CASES as LINEAR_CASES
from mixlora_exp.bench.linear_checks import linear_errors
from mixlora_exp.kernels import KERNELS

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class CheckTask:
    """One check. what: `block`, `router`, `linear` for LoRA layers (kernel `fused`), or `graph` for
    the capture of a CUDA graph; case: a name in `CASES`; for a graph only whether it is
    `MixDoRA`."""

    what: str
    kernel: str
    case: str
    dtype: str = "bfloat16"
    device: str = "cuda"

    def described(self) -> dict[str, Any]:
        """Return the check's settings as a record names them."""
        kernel = f"{self.kernel} {self.what}" if self.what != "block" else self.kernel
        return {"case": self.case, "kernel": kernel, "dtype": self.dtype}


def all_checks() -> list[CheckTask]:
    """Return all checks; first those that a training run in bf16 depends on.

    Checked are the kernels that compute in the precision of the products, those made for a device
    first, and their routers; the others consist of PyTorch's operations.
    """
    made = sorted((each for each in KERNELS.values() if not each.casts), key=lambda k: not k.device)
    parts = [(w, k.name) for k in made for w in ("block", "router") if w == "block" or k.device]
    blocks = []
    for dtype in DTYPES:
        blocks += [CheckTask(what, k, case, dtype) for case in CASES for what, k in parts]
        blocks += [CheckTask("linear", "fused", case, dtype) for case in LINEAR_CASES]
    both = ("paper's setting", "MixDoRA")
    graphs = [CheckTask("graph", each.name, case) for each in made for case in both]
    return [*blocks[: len(blocks) // len(DTYPES)], *graphs, *blocks[len(blocks) // len(DTYPES) :]]


def carry_out(task: CheckTask) -> dict[str, Any]:
    """Run one check; an exception becomes its result, so that one failure hides no other."""
    case, dtype = CASES[task.case], getattr(torch, task.dtype)
    try:
        if task.what == "block":
            # With one token the router's gradient is one number, whose rounding is chance: by a
            # single draw a right kernel may fail.
            seeds = max(1, 16 // case.tokens)
            found = kernel_errors(task.kernel, case, dtype, task.device, seeds) | {"seeds": seeds}
        elif task.what == "linear":
            found = linear_errors(case, dtype, task.device)
        elif task.what == "router":
            found = router_errors(task.kernel, case, dtype, task.device)
        else:
            error = capture_error(task.kernel, case.dora)
            found = {"error": error, "passed": error is None}
    except Exception as error:  # Triton's own errors have no common class.
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        found = {"passed": False, "error": reason}
    return {**found, **task.described()}


def failure(check: Mapping[str, Any]) -> str:
    """Return a check that did not pass, in a line: the tensor that is furthest off, and how far."""
    name = f"{check['case']}, {check['kernel']}, {check['dtype']}"
    if check.get("error"):
        return f"{name}: {check['error']}"
    if "worst_ratio" in check:
        return f"{name}: {check['worst']} at {check['worst_ratio']} of the reference's error"
    return f"{name}: {check['experts_wrong']} experts wrong, errors {check['errors']}"


def results(tasks: Sequence[CheckTask], processes: int, deadline: float) -> Iterator[dict]:
    """Yield the results as they come, until `deadline` (of `time.monotonic`); then, or when a
    process has died and took its check with it, the rest is left out."""
    # Not forked: CUDA cannot be used in a copy of a process that has used it.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(tasks)), torch.set_num_threads, (1,)) as pool:
        coming = pool.imap_unordered(carry_out, tasks)
        for _ in tasks:
            try:
                yield coming.next(timeout=max(0.0, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                return
