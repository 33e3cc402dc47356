"""Everything that needs a GPU, in one command and at most eight minutes: `make bench-gpu`.

Checks each kernel against float64 and in a CUDA graph, then measures Tables 6 and 7 at full depth
on random weights. Writes `results/bench/<gpu>.json` and the tables beside it. Needs nothing but
PyTorch, Triton, transformers, PEFT and the files of this repository: `src/` is found by itself.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from mixlora_exp.bench.checks import CASES, capture_error, kernel_errors  # noqa: E402
from mixlora_exp.bench.report import markdown  # noqa: E402
from mixlora_exp.bench.run import benchmark  # noqa: E402
from mixlora_exp.bench.settings import ROWS, BenchConfig  # noqa: E402
from mixlora_exp.errors import UserError, guarded  # noqa: E402
from mixlora_exp.results.record import finish_record, provenance, write_json  # noqa: E402
from mixlora_exp.runtime import hardware_names  # noqa: E402

LIMIT_S = 8 * 60
# Share of the limit by which each model's rounds end. Its warm-up is not cut short.
MODELS = (
    ("llama2_7b", 4, 512, 0.45),
    ("gemma_2b", 4, 512, 0.65),
    ("smollm2_135m", 8, 128, 0.78),
    ("llama3_8b", 4, 512, 0.95),
)


def _checks() -> list[dict]:
    found = []
    for kernel in ("triton", "exact"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for name, case in CASES.items():
                found.append({"case": name, **kernel_errors(kernel, case, dtype, "cuda", seeds=1)})
    return found


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(arguments: Sequence[str]) -> int:
    if not torch.cuda.is_available():
        raise UserError(
            "bench-gpu needs a CUDA GPU and this machine has none; the Triton kernels are checked "
            "by their interpreter in `make test`, and `make bench` measures the CPU"
        )
    start = time.monotonic()
    checks = _checks()
    failed = [check for check in checks if not check["passed"]]
    for check in failed:
        _tell(f"FAILED {check}")
    captures = [
        {"kernel": kernel, "dora": dora, "error": capture_error(kernel, dora)}
        for kernel in ("exact", "triton")
        for dora in (False, True)
    ]
    failed += [capture for capture in captures if capture["error"]]
    _tell(f"{len(checks)} checks, {len(captures)} graphs, {len(failed)} failed")
    models = arguments or [name for name, *_ in MODELS]
    benchmarks = []
    gpu = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    path = ROOT / "results" / "bench" / f"{gpu}.json"
    told = provenance(ROOT, hardware_names())
    for model, batch, length, share in MODELS:
        if model not in models or time.monotonic() - start > share * LIMIT_S:
            continue
        _tell(model)
        config = BenchConfig(model=model, batch=batch, length=length, rounds=20, rows=list(ROWS))
        found = benchmark(config, deadline=start + share * LIMIT_S, say=_tell)
        benchmarks.append(found)
        record = {
            "checks": checks,
            "captures": captures,
            "benchmarks": benchmarks,
            "seconds": round(time.monotonic() - start, 1),
            "provenance": told,
        }
        # After each model: what is measured stays, whatever comes next.
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, finish_record(record))
        tables = [markdown({**one, "provenance": told}) for one in benchmarks]
        path.with_suffix(".md").write_text("\n".join(tables))
        torch.cuda.empty_cache()
    print(path.with_suffix(".md").read_text() if benchmarks else "nothing measured")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
