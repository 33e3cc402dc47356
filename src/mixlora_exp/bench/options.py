"""Settings of benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixlora_exp.bench.rows import ROWS
from mixlora_exp.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(slots=True, kw_only=True)
class BenchOptions:
    """What every kind takes. `threads`: null is torch's choice; `output`: a folder, from the
    repository's root; `name`: of the files, instead of the one that tells what was measured."""

    threads: int | None = None
    output: str = "results/bench"
    name: str | None = None


@dataclass(slots=True, kw_only=True)
class StepOptions(BenchOptions):
    """A step of each row. `layers` cuts the depth (null: all); `dtype` is the frozen weights';
    `rounds`: each row is measured once a round, after a warm-up; `infer_every`: the forward pass
    without gradients in each n-th round; `memory`: also the peak of each row, on a CPU in a process
    of its own."""

    model: str = "smollm2_135m"
    layers: int | None = None
    batch: int = 8
    length: int = 128
    dtype: str = "bfloat16"
    dropout: float = 0.05
    rounds: int = 16
    infer_every: int = 4
    memory: bool = True
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    seed: int = 0


def require_positive(options: BenchOptions, *names: str) -> None:
    """Raises:
    UserError: one of the fields is under 1.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be >= 1")


def require_dtype(dtype: str, known: tuple[str, ...] = DTYPES) -> None:
    """Raises:
    UserError: it is none of `known`.
    """
    if dtype not in known:
        names = f"{', '.join(known[:-1])} or {known[-1]}"
        raise UserError(f"dtype={dtype} is not valid: choose {names}")
