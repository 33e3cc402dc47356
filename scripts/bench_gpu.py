"""Everything that needs a GPU, in one command and at most eight minutes: `make bench-gpu`.

Checks each kernel against float64 and in a CUDA graph, then measures Tables 6 and 7 at full depth
on random weights. Writes `results/bench/<gpu>.json` and the tables beside it. Needs nothing but
PyTorch, Triton, transformers, PEFT and the files of this repository: `src/` is found by itself.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from mixlora_exp.bench.checks import CASES, capture_error, kernel_errors, router_errors  # noqa: E402
from mixlora_exp.bench.report import markdown  # noqa: E402
from mixlora_exp.bench.run import benchmark  # noqa: E402
from mixlora_exp.bench.settings import ROWS, BenchConfig  # noqa: E402
from mixlora_exp.errors import UserError  # noqa: E402
from mixlora_exp.records.record import finish_record, provenance, write_json  # noqa: E402
from mixlora_exp.system.device import hardware_names  # noqa: E402
from mixlora_exp.system.guarded import guarded  # noqa: E402

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


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _models(arguments: Sequence[str]) -> list[tuple[str, int, int, float]]:
    known = [name for name, *_ in MODELS]
    for name in arguments:
        if name not in known:
            raise UserError(
                f"{name!r} is not a model of this suite: choose from {', '.join(known)}"
            )
    return [model for model in MODELS if not arguments or model[0] in arguments]


def run(arguments: Sequence[str]) -> int:
    models = _models(arguments)
    if not torch.cuda.is_available():
        raise UserError(
            "bench-gpu needs a CUDA GPU and this machine has none; the Triton kernels are checked "
            "by their interpreter in `make test`, and `make bench` measures the CPU"
        )
    start = time.monotonic()
    gpu = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    path = ROOT / "results" / "bench" / f"{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"checks": _checks(), "benchmarks": [], "skipped": {}}
    record["provenance"] = provenance(ROOT, hardware_names())
    failed = [check for check in record["checks"] if not check["passed"]]
    for check in failed:
        _tell(f"FAILED {check}")
    _tell(f"{len(record['checks'])} checks, {len(failed)} failed")

    def save() -> None:
        """After each part: what is measured stays, whatever comes next."""
        record["seconds"] = round(time.monotonic() - start, 1)
        write_json(path, finish_record(record))
        tables = [
            markdown({**one, "provenance": record["provenance"]}) for one in record["benchmarks"]
        ]
        path.with_suffix(".md").write_text("\n".join(tables))

    save()
    rows = [*FIRST, *(row for row in ROWS if row not in FIRST)]
    for model, batch, length, share in models:
        if time.monotonic() - start > share * LIMIT_S:
            record["skipped"][model] = "no time left"
            continue
        _tell(model)
        config = BenchConfig(model=model, batch=batch, length=length, rounds=20, rows=rows)
        try:
            found = benchmark(config, deadline=start + share * LIMIT_S, say=_tell)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            record["skipped"][model] = reason
            _tell(f"{model}: {reason}")
        else:
            record["benchmarks"].append(found)
        save()
        torch.cuda.empty_cache()
    for model, reason in record["skipped"].items():
        _tell(f"not measured: {model}: {reason}")
    save()
    print(path.with_suffix(".md").read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
