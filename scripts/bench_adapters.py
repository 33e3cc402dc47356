"""Measure what several adapters on one base cost: `python scripts/bench_adapters.py kind=mixdora`.

Any field of `SeveralConfig` can be given as `name=value`. Writes `results/bench/<name>.json` and
the tables beside it as `.md`.
"""

from __future__ import annotations

import sys

from mixlora_exp.bench.several import SeveralConfig, benchmark_several
from mixlora_exp.bench.several_report import several_markdown
from mixlora_exp.bench.store import compose_settings, write_files
from mixlora_exp.system.guarded import guarded


def run(arguments: list[str]) -> None:
    config = compose_settings(SeveralConfig, arguments)
    result = benchmark_several(config)
    parts = ["adapters", result["device"], config.model, config.kind, f"{result['layers']}layers"]
    name = "-".join([*parts, f"{config.sequences}x{config.length}", config.dtype])
    paths, table = write_files(result, config.output, config.name or name, several_markdown)
    print(table)
    print("Written:", ", ".join(map(str, paths)))


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
