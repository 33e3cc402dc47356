"""Files of weights from strangers: named, dense, finite tensors, or one message."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mixlora_exp.errors import UserError, shown

__all__ = ["load_bin", "load_metadata", "load_safetensors", "load_shapes"]

MAKERS = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double", "Long", "Int")),
}  # fmt: skip
"""What the pickle of a dictionary of tensors names."""
LONGEST = 200
"""Characters that are shown of a name from a file."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEGACY = bytes.fromhex("80028a0a6cfc9c46f920")
"""How a file begins that torch.save wrote before version 1.6, or was asked to write so."""


def _check_archive(path: Path) -> None:
    """A file of `torch.save` is a zip archive that stores its members as they are, and its pickle
    names what makes tensors alone. A compressed member could unpack to any size, and even harmless
    types (a `bytearray`) can fill the memory."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(LEGACY)) == LEGACY and not zipfile.is_zipfile(path):
                raise UserError(
                    f"{path} is in torch.save's format of before PyTorch 1.6, whose size cannot be "
                    "checked before it is read: if you trust it, torch.load it with "
                    "weights_only=True and torch.save it again"
                )
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
    more = f"{path} is damaged or holds more than tensors"
    for code, argument, _ in pickletools.genops(content):
        if code.name == "GLOBAL" and argument not in MAKERS:
            named = shown(str(argument).replace(" ", "."), 80)
            raise UserError(f"{more} ({named}): take another copy")
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2",
                         "EXT4"):  # fmt: skip
            raise UserError(f"{more} ({code.name}): take another copy")


def _check_tensors(path: Path, tensors: Any, *, least: int = 1) -> dict[str, Tensor]:
    """Named, dense matrices and vectors of numbers that fill no more memory than the file."""
    if not isinstance(tensors, dict) or len(tensors) < least:
        raise UserError(f"{path} holds no named tensors: take another copy")
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: {shown(repr(name), LONGEST)} is no named tensor: take another copy"
            )
        where = f"{path}: {shown(name, LONGEST)}"
        if tensor.layout is not torch.strided or tensor.dtype not in FLOATS:
            raise UserError(f"{where} is no matrix of floating-point numbers: take another copy")
        # With the experts of a layer in one tensor there are three dimensions.
        if not 1 <= tensor.dim() <= 3:
            raise UserError(f"{where} has {tensor.dim()} dimensions, which no part of an adapter "
                            "has: take another copy")  # fmt: skip
        # Also where it is a view that repeats one number many times.
        total += tensor.numel() * tensor.element_size()
        if total > path.stat().st_size:
            raise UserError(f"{path}: its tensors have more bytes than the file: take another copy")
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{where} holds values that are no finite numbers: the training that made it broke "
                "down; take an earlier checkpoint"
            )
    return tensors


def load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`; no program in it is run.

    Raises:
        UserError: it is cut off, too large, of an old format, or holds more than tensors.
    """
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
    return _check_tensors(path, loaded)


def load_safetensors(path: Path, *, least: int = 1) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of which there must be `least`.

    Raises:
        UserError: it is cut off or damaged.
    """
    with _told(path):
        return _check_tensors(path, load_file(path), least=least)


def load_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, read from its header alone.

    Raises:
        UserError: it is cut off or damaged.
    """
    with _told(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): take another copy") from error


def load_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file.

    Raises:
        UserError: it is cut off or damaged.
    """
    with _told(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
