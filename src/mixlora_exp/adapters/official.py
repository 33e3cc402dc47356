"""Files of the adapter format of the official packages (moe-peft, mixlora): reading and writing.

A folder holds `adapter_config.json` and `adapter_model.bin`. What stands in them is told apart in
`conversion`; here files from strangers become checked values, or are refused.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixlora_exp.errors import UserError

__all__ = [
    "BIN",
    "CONFIG",
    "KEPT",
    "SAFETENSORS",
    "AdapterFiles",
    "Converted",
    "read_official",
    "read_peft",
    "write_official",
    "write_peft",
]

CONFIG, BIN, SAFETENSORS = "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"
KEPT = "mixlora_exp"
"""Entry of an exported configuration with what the official format does not know; the official
packages read the entries they know and pass over it."""
CONFIG_LIMIT = 2**20
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it lies on disk: its configuration and its tensors by name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Converted:
    """The adapter in the other format, and what a user should know about it."""

    files: AdapterFiles
    notes: list[str]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        size = path.stat().st_size
        if size > CONFIG_LIMIT:
            raise UserError(f"{path} has {size:,} bytes, which no configuration has")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): give a folder with an adapter"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): take another copy") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: take another copy")
    return config


def _check_archive(path: Path) -> None:
    """A file of `torch.save` is a zip archive that stores its members as they are; a compressed
    one could unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(
            f"{path} is cut off, damaged or no file of torch.save ({error}): take another copy"
        ) from error
    if unpacked > path.stat().st_size:
        raise UserError(
            f"{path} would unpack to {unpacked:,} bytes, more than it has, which torch.save does "
            "not do: take another copy"
        )


def _check_tensors(path: Path, tensors: Any) -> dict[str, Tensor]:
    """Named, dense matrices and vectors of numbers that fill no more memory than the file."""
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds no named tensors: take another copy")
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} is no named tensor: take another copy")
        if tensor.layout is not torch.strided or tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {name} is no matrix of floating-point numbers")
        if not tensor.is_contiguous() or tensor.is_meta:
            raise UserError(f"{path}: {name} is a view of other numbers, not a matrix of its own")
        total += tensor.nbytes
    if total > path.stat().st_size:
        raise UserError(f"{path}: its tensors have {total:,} bytes, more than the file")
    return tensors


def read_official(folder: Path) -> AdapterFiles:
    """Read a folder that moe-peft or mixlora wrote.

    A DoRA magnitude has no place in the `.bin`. Where `adapter_model.safetensors` stands beside it
    with the same tensors and magnitudes, these are read too.

    Raises:
        UserError: a file is missing, cut off or too large, or holds anything but named tensors.
    """
    config, path = _config(folder), folder / BIN
    if not path.is_file():
        raise UserError(f"{folder} has no {BIN}: give a folder that moe-peft or mixlora wrote")
    _check_archive(path)
    try:
        # Tensors alone: a pickle may hold any program.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError,
            pickle.UnpicklingError, AssertionError, IndexError) as error:  # fmt: skip
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"{path} is cut off, damaged or holds more than tensors ({reason}): take another copy"
        ) from error
    tensors = _check_tensors(path, loaded)
    beside = folder / SAFETENSORS
    if beside.is_file():
        more = _load_safetensors(beside)
        same = all(name in more and torch.equal(more[name], t) for name, t in tensors.items())
        extra = {name for name in more if name not in tensors}
        if same and all(name.endswith("lora_magnitude_vector") for name in extra):
            tensors = {**tensors, **{name: more[name] for name in sorted(extra)}}
    return AdapterFiles(config, tensors)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return _check_tensors(path, load_file(path))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): take another copy") from error


def read_peft(folder: Path) -> AdapterFiles:
    """Read a folder that PEFT wrote.

    Raises:
        UserError: a file is missing, cut off or damaged.
    """
    path = folder / SAFETENSORS
    config = _config(folder)
    if not path.is_file():
        raise UserError(f"{folder} has neither {BIN} nor {SAFETENSORS}: give an adapter's folder")
    return AdapterFiles(config, _load_safetensors(path))


def _write(folder: Path, config: str, weights: Any) -> None:
    """Write both files to a new folder, which appears whole or not at all."""
    if folder.exists():
        raise UserError(f"{folder} exists already: name another folder, or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        weights(partial)
        (partial / CONFIG).write_text(config, encoding="utf-8")
        os.replace(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
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
    tensors = {name: tensor.contiguous() for name, tensor in files.tensors.items()}
    text = json.dumps(files.config, indent=2, sort_keys=True)
    _write(folder, text, lambda to: save_file(tensors, to / SAFETENSORS, metadata={"format": "pt"}))
