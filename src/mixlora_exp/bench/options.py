"""Settings of benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from mixlora_exp.bench.row_registry import ROWS
from mixlora_exp.config.choices import LossOn
from mixlora_exp.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def usual_rows() -> list[str]:
    """Return the names of the rows that are measured by default."""
    return [name for name, row in ROWS.items() if not row.if_named]


ALL_NAMED = "methods"
"""Stands in `rows` for every mixture in linear layers, MixLoRA with every other router, and the
methods beside LoRA that are no mixtures."""


@dataclass(slots=True, kw_only=True)
class BenchOptions:
    """Options of every kind of benchmark. `threads`: null is torch's choice; `output`: a folder,
    from the repository's root; `name`: of the files, instead of the one that tells what was
    measured."""

    threads: int | None = None
    output: str = "results/bench"
    name: str | None = None


@dataclass(slots=True, kw_only=True)
class StepOptions(BenchOptions):
    """A step of each row. `layers` cuts the depth (null: all); `loss_on`: the last `answer` tokens
    of each sequence, whose logits alone are computed then, or `all` of them, as in training;
    `dtype` is the frozen weights'; `rounds`: each row is measured once a round, after a warm-up;
    `infer_every`: the forward pass without gradients in each n-th round; `memory`: also the peak of
    each row, on a CPU in a process of its own; `liger`: liger-kernel's patches of the base model
    under all rows alike, on a GPU; `rows`: names, and `methods` for all that have to be named."""

    model: str = "smollm2_135m"
    layers: int | None = None
    batch: int = 8
    length: int = 128
    loss_on: LossOn = LossOn.answer
    answer: int = 8
    dtype: str = "bfloat16"
    dropout: float = 0.05
    rounds: int = 16
    infer_every: int = 4
    memory: bool = True
    liger: bool = False
    rows: list[str] = field(default_factory=usual_rows)
    seed: int = 0

    def __post_init__(self) -> None:
        named = [name for name, row in ROWS.items() if row.if_named]
        given = [each for name in self.rows for each in (named if name == ALL_NAMED else [name])]
        self.rows = list(dict.fromkeys(given))


def as_json(options: BenchOptions) -> dict[str, Any]:
    """Return the settings as a record has them."""
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in asdict(options).items()
    }


def require_positive(options: BenchOptions, *names: str) -> None:
    """Check that the fields `names` are at least 1.

    Raises:
        UserError: one of them is less.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be >= 1")


def require_dtype(dtype: str, known: tuple[str, ...] = DTYPES) -> None:
    """Check that a dtype is one of `known`.

    Raises:
        UserError: it is not.
    """
    if dtype not in known:
        names = f"{', '.join(known[:-1])} or {known[-1]}"
        raise UserError(f"dtype={dtype} is not valid: choose {names}")
