"""Files of weights from strangers: named, dense, finite tensors, or one message."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mixlora_exp.errors import UserError, shown

LONGEST = 200
"""Characters that are shown of a name from a file."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save` (PyTorch 1.6 or later); no program in it is run.

    Raises:
        UserError: it is cut off, damaged, compressed, of an older format, or holds anything but
            named, finite tensors that fill no more memory than the file.
    """
    try:
        _check_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError,
            NotImplementedError, pickle.UnpicklingError, zipfile.BadZipFile, AssertionError,
            IndexError, MemoryError) as error:  # fmt: skip
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"{path} is cut off, damaged or holds more than tensors ({reason}): take another copy"
        ) from error
    return _check_tensors(path, loaded)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is cut off or damaged, or a tensor is no part of an adapter.
    """
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): take another copy") from error
    return _check_tensors(path, loaded)


def _check_archive(path: Path) -> None:
    """`torch.save` writes a zip archive whose members are stored as they are. A compressed one
    could unpack to any size, and of the format before PyTorch 1.6 no size is known in advance."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it would unpack to {unpacked:,} bytes, which torch.save does not do")


def _check_tensors(path: Path, tensors: Any) -> dict[str, Tensor]:
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds no named tensors: take another copy")
    total = 0
    for name, tensor in tensors.items():
        where = f"{path}: {shown(str(name), LONGEST)}"
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{where} is no named tensor: take another copy")
        if tensor.layout is not torch.strided or tensor.dtype not in FLOATS:
            raise UserError(f"{where} is no matrix of floating-point numbers: take another copy")
        if not 1 <= tensor.dim() <= 2:
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
