"""Reads adapters in the official packages' format, and writes adapters in PEFT's.

moe-peft and mixlora write `adapter_config.json` and `adapter_model.bin`. This module reads these
untrusted files safely; `imports` converts their content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixlora_exp.adapters.files import BIN, CONFIG, SAFETENSORS, read_adapter_config
from mixlora_exp.errors import UserError, shown
from mixlora_exp.official.weights import load_bin, load_safetensors
from mixlora_exp.system.durable import publishing

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The content of an adapter's folder: configuration, tensors by name, and notes for the user on
    how it was read or converted."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def read_official(folder: Path) -> AdapterFiles:
    """Read a folder that moe-peft or mixlora wrote.

    The `.bin` file contains no DoRA magnitudes. If an `adapter_model.safetensors` next to it has
    the same tensors and magnitudes, these are read too.

    Raises:
        UserError: a file is missing, truncated or too large, or contains more than named tensors.
    """
    config, path, beside = read_adapter_config(folder), folder / BIN, folder / SAFETENSORS
    if not path.is_file():
        if beside.is_file():
            return AdapterFiles(config, load_safetensors(beside))
        raise UserError(f"{folder} has no {BIN}: give a folder that moe-peft or mixlora wrote")
    tensors = load_bin(path)
    if not beside.is_file():
        return AdapterFiles(config, tensors)
    more = load_safetensors(beside)
    odd = [(n, _unlike(t, more.get(n))) for n, t in tensors.items()]
    extra = sorted(name for name in more if name not in tensors)
    odd += [(n, "is missing in the first") for n in extra if not n.endswith(MAGNITUDE)]
    different = [f"{shown(name, 200)} {why}" for name, why in odd if why]
    if different:
        raise UserError(
            f"{folder}: {BIN} and {SAFETENSORS} are not of one adapter ({different[0]}): "
            "remove one of them"
        )
    note = f"the magnitudes are those of {SAFETENSORS} next to {BIN}, which has none"
    return AdapterFiles(config, more, (note,) if extra else ())


def _unlike(one: Tensor, other: Tensor | None) -> str:
    """Return the description of how two tensors differ; empty if they are equal."""
    if other is None:
        return "is missing in the second"
    if one.dtype is not other.dtype:
        return f"is {one.dtype} in one and {other.dtype} in the other"
    return "" if torch.equal(one, other) else "differs"


def write_peft(folder: Path, files: AdapterFiles) -> None:
    """Write a new folder in PEFT's format, atomically.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    try:
        with publishing(folder) as new:
            save_file(_own_memory(files.tensors), new / SAFETENSORS, metadata={"format": "pt"})
            text = json.dumps(files.config, indent=2, sort_keys=True)
            (new / CONFIG).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{folder} already exists: name another folder, or remove it") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({error}): name another folder") from error


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors that share memory: safetensors refuses them, and a file of
    `torch.save` may hold one tensor under two names."""
    seen, found = set(), {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = (tensor.clone() if place in seen else tensor).contiguous()
        seen.add(place)
    return found
