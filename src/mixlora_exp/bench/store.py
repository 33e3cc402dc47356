"""Where a benchmark's record and table go."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mixlora_exp.bench.report import markdown
from mixlora_exp.bench.settings import BenchConfig
from mixlora_exp.errors import UserError
from mixlora_exp.records.record import finish_record, provenance, write_json
from mixlora_exp.system.device import hardware_names

__all__ = ["compose_settings", "write", "write_files"]

Settings = TypeVar("Settings")

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
    return write_files(result, config.output, lambda record: _name(config, record), markdown)


def write_files(
    result: dict[str, Any],
    output: str,
    name: str | Callable[[dict[str, Any]], str],
    table_of: Callable[[dict[str, Any]], str],
) -> tuple[list[Path], str]:
    """The same for any benchmark, given its file name (or how to find it) and its table."""
    record = {**result, "provenance": provenance(ROOT, hardware_names())}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = name if isinstance(name, str) else name(record)
    table = table_of(record)
    paths = [folder / f"{chosen}.json", folder / f"{chosen}.md"]
    write_json(paths[0], finish_record(record))
    paths[1].write_text(table)
    return paths, table


def compose_settings(kind: type[Settings], arguments: list[str]) -> Settings:
    """The settings of a benchmark from `name=value` arguments.

    Raises:
        UserError: a field is unknown or its value is of the wrong kind.
    """
    known = ", ".join(kind.__dataclass_fields__)
    if any(word in ("-h", "--help") for word in arguments):
        sys.stdout.write(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\nFields: {known}\n")
        raise SystemExit(0)
    # Imported late: on a machine without Hydra settings are made in Python.
    from hydra import compose, initialize
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="bench", node=kind)
    try:
        with initialize(version_base=None, config_path=None):
            return OmegaConf.to_object(compose(config_name="bench", overrides=arguments))
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{reason}; the fields are {known}") from error
