"""Safe reading of untrusted weight files: named, dense, finite tensors, or a `UserError`."""

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
"""Maximum number of characters of a tensor's name in a message."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_bin(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `torch.save` file (PyTorch 1.6 or later), without executing code in
    it.

    Raises:
        UserError: it is truncated, damaged, compressed, of an older format, or holds anything but
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
            f"{path} is truncated, damaged or holds more than tensors ({reason}): use another copy"
        ) from error
    return _check_tensors(path, loaded)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: it is truncated or damaged, or a tensor cannot be part of an adapter.
    """
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): use another copy") from error
    return _check_tensors(path, loaded)


def _check_archive(path: Path) -> None:
    """Refuse a compressed archive, which could unpack to any size, and the format before PyTorch
    1.6, whose size is not known in advance; `torch.save` stores its members as they are."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it would unpack to {unpacked:,} bytes, which torch.save does not do")


def _check_tensors(path: Path, tensors: Any) -> dict[str, Tensor]:
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds no named tensors: use another copy")
    total = 0
    for name, tensor in tensors.items():
        where = f"{path}: {shown(str(name), LONGEST)}"
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{where} is not a named tensor: use another copy")
        if tensor.layout is not torch.strided or tensor.dtype not in FLOATS:
            raise UserError(f"{where} is not a floating-point matrix: use another copy")
        if not 1 <= tensor.dim() <= 2:
            raise UserError(f"{where} has {tensor.dim()} dimensions, which no part of an adapter "
                            "has: use another copy")  # fmt: skip
        # Also where it is a view that repeats one number many times.
        total += tensor.numel() * tensor.element_size()
        if total > path.stat().st_size:
            raise UserError(f"{path}: its tensors have more bytes than the file: use another copy")
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{where} contains values that are not finite, because its training diverged: "
                "use an earlier checkpoint"
            )
    return tensors
