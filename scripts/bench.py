"""Measure what a step of each method costs: `python scripts/bench.py model=llama2_7b layers=2`.

Any field of `BenchConfig` can be given as `name=value`; `rows=[lora_peft,mixlora]` takes a few rows
alone. Writes `results/bench/<name>.json` and the table beside it as `.md`.
"""

from __future__ import annotations

import sys

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixlora_exp.bench.run import benchmark
from mixlora_exp.bench.settings import BenchConfig
from mixlora_exp.bench.store import write
from mixlora_exp.errors import UserError, guarded


def _compose(arguments: list[str]) -> BenchConfig:
    ConfigStore.instance().store(name="bench", node=BenchConfig)
    try:
        with initialize(version_base=None, config_path=None):
            return OmegaConf.to_object(compose(config_name="bench", overrides=arguments))
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        known = ", ".join(BenchConfig.__dataclass_fields__)
        raise UserError(f"{reason}; the fields are {known}") from error


def run(arguments: list[str]) -> None:
    config = _compose(arguments)
    paths, table = write(benchmark(config), config)
    print(table)
    print("Written:", ", ".join(map(str, paths)))


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
