"""Measure what things cost here: `python scripts/bench.py kind=steps model=llama2_7b layers=2`.

kind=steps     a training step and a forward pass of each method, rows=[lora_peft,mixlora] of a few;
               loss_on=all, liger=true on a GPU
kind=adapters  several adapters on one base, in time and memory: method=mixdora, or mixed
kind=together  several adapters in one run against one run after another: data.path=DIR
kind=peers     MixLoRA here and in the packages moe-peft and mixlora, in turns
kind=eval      items per second of scoring, here and in lm-eval's own loop
kind=forms     the exact kernel's two forms, by which it chooses on a CPU
kind=gpu       kernels against float64, then kind=steps of four models, in minutes=4; tests=true
               runs the tests of the Triton kernels afterwards

Writes `results/bench/<name>.json`, and tables beside it as `.md`. Further words are `name=value`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A GPU machine may have PyTorch, transformers and PEFT alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mixlora_exp.bench.runner import run_benchmark
from mixlora_exp.system.guarded import guarded


def run(arguments: list[str]) -> int:
    written = run_benchmark(arguments)
    print(written.tables)
    print("Written:", ", ".join(map(str, written.paths)))
    for check in written.failed:
        print(f"FAILED: {check}", file=sys.stderr)
    return 1 if written.failed else 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
