"""Folders of adapters, in the format of the official packages (moe-peft, mixlora) and in PEFT's.

The official one has `adapter_config.json` and `adapter_model.bin`. What stands in them is told
apart in `conversion` and `export`; here files from strangers become values, or are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixlora_exp.adapters.files import BIN, CONFIG, SAFETENSORS, read_adapter_config
from mixlora_exp.adapters.weights import load_bin, load_metadata, load_safetensors
from mixlora_exp.errors import UserError, shown
from mixlora_exp.system.durable import publishing
from mixlora_exp.system.untrusted import parse_json

__all__ = [
    "KEPT",
    "AdapterFiles",
    "Converted",
    "Original",
    "read_official",
    "read_peft",
    "write_official",
    "write_peft",
]

KEPT = "mixlora_exp"
"""Entry of an exported configuration with what the official format does not know; the official
packages read the entries they know and pass over it."""
OFFICIAL = "official.safetensors"
"""Beside an imported adapter: its official configuration as it was, and the tensors for which PEFT
has no place, so that it can go back as it came."""
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class Original:
    """What an adapter of PEFT's was imported from: the official configuration, what it became, and
    the tensors that PEFT has no place for (routers over experts without weights)."""

    config: Mapping[str, Any]
    peft: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it lies on disk: its configuration, its tensors by name, what a user should
    know about how they were read, and what it was imported from, if that is known."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    original: Original | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """The adapter in the other format, and what a user should know about it."""

    files: AdapterFiles
    notes: list[str]


def read_official(folder: Path) -> AdapterFiles:
    """Read a folder that moe-peft or mixlora wrote.

    A DoRA magnitude has no place in the `.bin`. Where `adapter_model.safetensors` stands beside it
    with the same tensors and magnitudes, these are read too.

    Raises:
        UserError: a file is missing, cut off or too large, or holds anything but named tensors.
    """
    config, path, beside = read_adapter_config(folder), folder / BIN, folder / SAFETENSORS
    if not path.is_file():
        if beside.is_file():
            return AdapterFiles(config, load_safetensors(beside))
        raise UserError(f"{folder} has no {BIN}: give a folder that moe-peft or mixlora wrote")
    tensors, notes = load_bin(path), ()
    if beside.is_file():
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
        if extra:
            tensors = {**tensors, **{name: more[name] for name in extra}}
            notes = (f"the magnitudes are those of {SAFETENSORS} beside {BIN}, which has none",)
    return AdapterFiles(config, tensors, notes)


def _unlike(one: Tensor, other: Tensor | None) -> str:
    """How two tensors differ; empty if they do not."""
    if other is None:
        return "is missing in the second"
    if one.dtype is not other.dtype:
        return f"is {one.dtype} in one and {other.dtype} in the other"
    return "" if torch.equal(one, other) else "differs"


def read_peft(folder: Path) -> AdapterFiles:
    """Read a folder that PEFT wrote, with `adapter_model.safetensors` or, as it did before 2024,
    with `adapter_model.bin`.

    Raises:
        UserError: a file is missing, cut off or damaged.
    """
    config, path, old = read_adapter_config(folder), folder / SAFETENSORS, folder / BIN
    if path.is_file():
        return AdapterFiles(config, load_safetensors(path), original=_read_original(folder))
    if old.is_file():
        return AdapterFiles(config, load_bin(old))
    raise UserError(f"{folder} has neither {BIN} nor {SAFETENSORS}: give an adapter's folder")


def _read_original(folder: Path) -> Original | None:
    path = folder / OFFICIAL
    if not path.is_file():
        return None
    tensors, texts = load_safetensors(path, least=0), load_metadata(path)
    try:
        found = parse_json(texts["original"])
        config, peft = found["config"], found["peft"]
        if not isinstance(config, dict) or not isinstance(peft, dict):
            raise ValueError("no JSON objects")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it") from error
    return Original(config, peft, tensors)


def _write(folder: Path, config: str, weights: Callable[[Path], None]) -> None:
    """Write both files to a new folder, which appears whole or not at all."""
    try:
        with publishing(folder) as new:
            weights(new)
            (new / CONFIG).write_text(config, encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{folder} exists already: name another folder, or remove it") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({error}): name another folder") from error


def write_official(folder: Path, files: AdapterFiles) -> None:
    """Write a folder as moe-peft writes it.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    tensors = dict(files.tensors)
    _write(folder, json.dumps(files.config, indent=4), lambda to: torch.save(tensors, to / BIN))


def write_peft(folder: Path, files: AdapterFiles) -> None:
    """Write a folder as PEFT writes it.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    tensors, original = _own_memory(files.tensors), files.original

    def weights(to: Path) -> None:
        save_file(tensors, to / SAFETENSORS, metadata={"format": "pt"})
        if original is not None:
            # One entry: of several, safetensors writes the order as it comes.
            found = {"config": dict(original.config), "peft": dict(original.peft)}
            texts = {"original": json.dumps(found)}
            save_file(_own_memory(original.tensors), to / OFFICIAL, metadata=texts)

    _write(folder, json.dumps(files.config, indent=2, sort_keys=True), weights)


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors asks: a file of torch.save may give one tensor two
    names."""
    seen, found = set(), {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = (tensor.clone() if place in seen else tensor).contiguous()
        seen.add(place)
    return found
