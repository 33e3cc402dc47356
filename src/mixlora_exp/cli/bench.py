"""Measure time and memory: `mixlora-exp bench kind=steps model=llama2_7b layers=2`.

kind=steps     a training step and a forward pass of each method, rows=[lora_peft,mixlora] of a few;
               loss_on=all, liger=true on a GPU
kind=adapters  several adapters on one base, in time and memory: method=mixdora, or mixed
kind=together  several adapters in one run against one run after another: data.path=DIR
kind=peers     MixLoRA here and in the packages moe-peft and mixlora, in turns
kind=eval      items per second of scoring, here and in lm-eval's own loop
kind=forms     the exact kernel's two forms, by which it chooses on a CPU
kind=bytes     bytes that a step of each row keeps, and the most that live at once, on a CPU
kind=gpu       kernels against float64, then kind=steps of four models, in minutes=4; tests=true
               runs the tests of the Triton kernels afterwards

Writes `results/bench/<name>.json`, and tables beside it as `.md`. `kind=NAME --help` prints the
settings of a kind with their defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code: 1 where a check failed.

    Raises:
        UserError: the command line is not valid, or the benchmark cannot be executed here.
    """
    words = [word for word in argv if word not in ("-h", "--help")]
    if not words and words != list(argv):
        print((__doc__ or "").strip())
        return 0
    # Imported late: torch takes seconds to load.
    from mixlora_exp.bench.runner import kind_of, run_benchmark, split_kind

    if words != list(argv):
        options = kind_of(split_kind(words)[0]).options()
        for field in fields(options):
            print(f"{field.name}={getattr(options, field.name)}")
        return 0
    written = run_benchmark(words)
    print(written.tables)
    print("Written:", ", ".join(map(str, written.paths)))
    for check in written.failed:
        print(f"FAILED: {check}", file=sys.stderr)
    return 1 if written.failed else 0
