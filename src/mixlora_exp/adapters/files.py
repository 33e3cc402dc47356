"""The files in an adapter's folder: their names, and safe reading of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixlora_exp.errors import UserError
from mixlora_exp.system.untrusted import read_json

__all__ = ["BIN", "CONFIG", "SAFETENSORS", "is_official", "read_adapter_config"]


CONFIG, BIN, SAFETENSORS = "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"
CONFIG_LIMIT = 2**20
PEFTS_OWN = {"peft_version", "auto_mapping", "inference_mode", "init_lora_weights"}
"""Fields that PEFT writes but the official packages do not."""


def read_adapter_config(folder: Path, field: str = "") -> dict[str, Any]:
    """Return the configuration of an adapter in PEFT's or the official format; `field`: name of the
    setting with the folder, for messages.

    Raises:
        UserError: it is missing, truncated, damaged or too large.
    """
    path = folder / CONFIG
    place = f"{field}={folder}" if field else str(folder)
    named = f"{place}: {CONFIG}" if field else str(path)
    try:
        size = path.stat().st_size
        if size > CONFIG_LIMIT:
            raise UserError(f"{named} has {size:,} bytes, which no configuration has")
        config = read_json(path, finite=False)
    except FileNotFoundError as error:
        inner = (folder / "adapter" / CONFIG).is_file()
        hint = f"did you mean {folder / 'adapter'}?" if inner else "give a folder that has one"
        raise UserError(f"{place} has no {CONFIG}: {hint}") from error
    except OSError as error:
        raise UserError(
            f"{named} cannot be read ({error.strerror or error}): give a folder with an adapter"
        ) from error
    except ValueError as error:
        raise UserError(f"{named} is truncated or damaged ({error}): take another copy") from error
    if not isinstance(config, dict):
        raise UserError(f"{named} holds no JSON object: take another copy")
    return config


def is_official(folder: Path) -> bool:
    """Return whether the official packages wrote an adapter's folder. Mainly the keys of its
    configuration decide: PEFT wrote `.bin` files too, and an official one may have been converted
    to safetensors.

    Raises:
        UserError: there is no configuration, or it is damaged.
    """
    config = read_adapter_config(folder)
    if PEFTS_OWN & set(config):
        return False
    return (folder / BIN).is_file() or "routing_strategy" in config
