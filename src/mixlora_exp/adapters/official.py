"""Files of the adapter format of the official packages (moe-peft, mixlora): reading and writing.

A folder holds `adapter_config.json` and `adapter_model.bin`. What stands in them is told apart in
`conversion`; here files from strangers become checked values, or are refused.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import tempfile
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
MAKERS = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double", "Long", "Int")),
}  # fmt: skip
"""What the pickle of a dictionary of tensors names."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it lies on disk: its configuration, its tensors by name, and what a user
    should know about how they were read."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


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
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no adapter (there is no {CONFIG}): give a folder that has one"
        ) from error
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
    """A file of `torch.save` is a zip archive that stores its members as they are, and its pickle
    names what makes tensors alone. A compressed member could unpack to any size, and even harmless
    types (a `bytearray`) can fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > path.stat().st_size:
                raise UserError(
                    f"{path} would unpack to {unpacked:,} bytes, more than it has, which "
                    "torch.save does not do: take another copy"
                )
            pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
            for name in pickles:
                _check_pickle(path, archive.read(name))
            if not pickles:
                raise ValueError("it has no pickle")
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{path} is cut off, damaged or no file of torch.save ({error}): take another copy"
        ) from error


def _check_pickle(path: Path, content: bytes) -> None:
    for code, argument, _ in pickletools.genops(content):
        if code.name == "GLOBAL" and argument not in MAKERS:
            named = str(argument).replace(" ", ".")[:80]
            raise UserError(f"{path} is damaged or holds more than tensors ({named})")
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2",
                         "EXT4"):  # fmt: skip
            raise UserError(f"{path} is damaged or holds more than tensors ({code.name})")


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
        # Also where it is a view that repeats one number many times.
        total += tensor.numel() * tensor.element_size()
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
            pickle.UnpicklingError, AssertionError, IndexError, MemoryError) as error:  # fmt: skip
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"{path} is cut off, damaged or holds more than tensors ({reason}): take another copy"
        ) from error
    tensors = _check_tensors(path, loaded)
    beside, notes = folder / SAFETENSORS, ()
    if beside.is_file():
        more = _load_safetensors(beside)
        odd = [n for n, t in tensors.items() if n not in more or not torch.equal(more[n], t)]
        extra = sorted(name for name in more if name not in tensors)
        odd += [name for name in extra if not name.endswith("lora_magnitude_vector")]
        if odd:
            raise UserError(
                f"{folder}: {BIN} and {SAFETENSORS} are not of one adapter ({odd[0]} differs): "
                "remove one of them"
            )
        if extra:
            tensors = {**tensors, **{name: more[name] for name in extra}}
            notes = (f"the magnitudes are those of {SAFETENSORS} beside {BIN}, which has none",)
    return AdapterFiles(config, tensors, notes)


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
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        partial.chmod(0o755)
        weights(partial)
        (partial / CONFIG).write_text(config, encoding="utf-8")
        os.replace(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if partial is not None:
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
