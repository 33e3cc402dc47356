"""Measure what a step of each method costs: `python scripts/bench.py model=llama2_7b layers=2`.

Any field of `BenchConfig` can be given as `name=value`; `rows=[lora_peft,mixlora]` takes a few rows
alone. Writes `results/bench/<name>.json` and the table beside it as `.md`.
"""

from __future__ import annotations

import sys

from mixlora_exp.bench.run import benchmark
from mixlora_exp.bench.settings import BenchConfig
from mixlora_exp.bench.store import compose_settings, write
from mixlora_exp.system.guarded import guarded


def run(arguments: list[str]) -> None:
    config = compose_settings(BenchConfig, arguments)
    paths, table = write(benchmark(config), config)
    print(table)
    print("Written:", ", ".join(map(str, paths)))


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
