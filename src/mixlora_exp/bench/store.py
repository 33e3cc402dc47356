"""Where a benchmark's record and table go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mixlora_exp.bench.report import markdown
from mixlora_exp.bench.settings import BenchConfig
from mixlora_exp.results.record import finish_record, provenance, write_json
from mixlora_exp.runtime import hardware_names

__all__ = ["write"]

ROOT = Path(__file__).resolve().parents[3]


def _name(config: BenchConfig, record: dict[str, Any]) -> str:
    if config.name is not None:
        return config.name
    hardware = record["provenance"]["hardware"]
    machine = (hardware.get("gpus") or ["cpu"])[0]
    slug = re.sub(r"[^a-z0-9]+", "_", machine.lower()).strip("_")
    parts = [slug, config.model, f"{record['layers']}layers", f"{config.batch}x{config.length}"]
    return "-".join([*parts, config.dtype, f"dropout{config.dropout:g}"])


def write(result: dict[str, Any], config: BenchConfig) -> tuple[list[Path], str]:
    """Write `<name>.json` and `<name>.md` into `config.output`; returns their paths and the
    table. The JSON carries the provenance and a hash of its content."""
    record = {**result, "provenance": provenance(ROOT, hardware_names())}
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = _name(config, record)
    table = markdown(record)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    write_json(paths[0], finish_record(record))
    paths[1].write_text(table)
    return paths, table
