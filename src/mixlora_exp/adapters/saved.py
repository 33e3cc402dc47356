"""What an adapter's folder must be to be used: one of PEFT's, of a type that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mixlora_exp.adapters.official import BIN, CONFIG, SAFETENSORS, is_official, read_adapter_config
from mixlora_exp.errors import UserError

__all__ = ["saved_settings"]

OF_OTHERS = {"megatron_config": "a module to import", "adapters": "other adapters"}
"""Entries that PEFT follows to what is not in the folder."""


def saved_settings(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter that PEFT, or this project, wrote to `folder`.

    Raises:
        UserError: a file is missing or damaged, the folder is one of the official packages', or
            PEFT does not know the adapter's type.
    """
    path = folder / CONFIG
    if not path.is_file():
        inner = (folder / "adapter" / CONFIG).is_file()
        hint = f"did you mean {folder / 'adapter'}?" if inner else "give a folder that PEFT wrote"
        raise UserError(f"adapter={folder} has no {CONFIG}: {hint}")
    config = read_adapter_config(folder, "adapter")
    if is_official(folder):
        raise UserError(
            f"adapter={folder} is in the format of the official packages: convert it first, "
            f"python scripts/convert_adapter.py {folder} OUT"
        )
    if not (folder / SAFETENSORS).is_file():
        old = (folder / BIN).is_file()
        hint = "load it with PEFT and save it again" if old else "give a folder that PEFT wrote"
        raise UserError(f"adapter={folder} has no {SAFETENSORS}: {hint}")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in set(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise UserError(
            f"adapter={folder}: peft_type={kind!r:.80} in {CONFIG} is none that PEFT knows: give a "
            "folder with LORA or MIXLORA"
        )
    for name, of in OF_OTHERS.items():
        if config.get(name):
            raise UserError(
                f"adapter={folder}: {name} in {CONFIG} names {of}, and what a file names is not "
                "opened: give an adapter without it"
            )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise UserError(
            f"adapter={folder}: base_model_name_or_path={base!r:.80} in {CONFIG} must be a text or "
            "null: mend the entry"
        )
    return config
