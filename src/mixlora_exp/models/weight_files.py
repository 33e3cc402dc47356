"""Lists and fingerprints the tensors of safetensors files from headers and samples, without loading
them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from mixlora_exp.errors import UserError
from mixlora_exp.models.file_cache import Stamp, content, stamp
from mixlora_exp.system.untrusted import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The limit of the safetensors library.
HEADER_LIMIT = 100_000_000
BLOCKS, BLOCK = 8, 16
"""Sample of a tensor: number of blocks, evenly spaced from its first to its last element, and
elements per block."""
WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes per element, by safetensors' dtype names."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file; `start`: offset of its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """Return the files from which transformers reads the weights of `folder`: one, or those of an
    index.

    The index can only name files in the folder itself.

    Raises:
        UserError: there are no weights, or the index is damaged or names missing files.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    present = {path.name: path for path in folder.glob("*.safetensors") if path.is_file()}
    if not (folder / INDEX).is_file():
        if not present:
            raise UserError(f"{folder} has no weights (*.safetensors): give a folder with a model")
        return [present[name] for name in sorted(present)]
    try:
        named = set(parse_json(content(folder / INDEX))["weight_map"].values())
        absent = sorted(map(str, named - present.keys()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / INDEX} is truncated or damaged: copy the model again"
        ) from error
    if absent or not named:
        lacking = f"it lacks {absent[0]!a:.100}" if absent else "its index names no file"
        raise UserError(f"{folder} is incomplete, {lacking}: copy the model again")
    return [present[name] for name in sorted(named)]


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _header(path: Path, stream: BinaryIO) -> Iterator[StoredTensor]:
    damaged = UserError(f"{path} is truncated or damaged: copy the model again")
    total = path.stat().st_size
    length = int.from_bytes(stream.read(8), "little")
    if total < 8 or length > min(HEADER_LIMIT, total - 8):
        raise damaged
    try:
        entries = parse_json(stream.read(length))
    except ValueError as error:
        raise damaged from error
    if not isinstance(entries, dict):
        raise damaged
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise damaged
        dtype, shape = entry.get("dtype"), entry.get("shape")
        offsets = entry.get("data_offsets")
        if (
            not isinstance(dtype, str)
            or not re.fullmatch(r"[A-Z0-9_]{1,16}", dtype)
            or not _numbers(shape)
            or not _numbers(offsets)
            or len(offsets) != 2
            or not offsets[0] <= offsets[1] <= total - 8 - length
            or (dtype in WIDTHS and math.prod(shape) * WIDTHS[dtype] != offsets[1] - offsets[0])
        ):
            raise damaged
        yield StoredTensor(name, dtype, tuple(shape), path, 8 + length + offsets[0])


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a model's folder, by name; only headers are read, and those once,
    unless a file changed.

    Raises:
        UserError: a file is missing, truncated or damaged.
    """
    paths = tuple(weight_files(folder))
    return dict(_stored(paths, tuple(map(stamp, paths))))


@lru_cache(maxsize=8)
def _stored(paths: tuple[Path, ...], _: tuple[Stamp, ...]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            with path.open("rb", buffering=0) as stream:
                found.update((tensor.name, tensor) for tensor in _header(path, stream))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}): make it readable, or copy the "
                "model again"
            ) from error
    return found


def _sample(stream: BinaryIO, tensor: StoredTensor) -> bytes:
    """Return the stored bytes of a sample of a tensor's elements."""
    width, count = WIDTHS.get(tensor.dtype, 1), tensor.elements
    if count <= BLOCKS * BLOCK:
        stream.seek(tensor.start)
        return stream.read(count * width)
    pieces = []
    for number in range(BLOCKS):
        stream.seek(tensor.start + (count - BLOCK) * number // (BLOCKS - 1) * width)
        pieces.append(stream.read(BLOCK * width))
    return b"".join(pieces)


def fingerprint(folder: Path) -> str:
    """Return SHA-256 of the names, shapes, dtypes and a sample of the elements of all tensors.

    It does not depend on the distribution of tensors over files. About 300 bytes per tensor are
    read, so weights that differ in only a few elements may have the same fingerprint. They are read
    once, unless a file changed.

    Raises:
        UserError: a file is missing, truncated or damaged.
    """
    paths = tuple(weight_files(folder))
    return _fingerprint(folder, paths, tuple(map(stamp, paths)))


@lru_cache(maxsize=8)
def _fingerprint(folder: Path, paths: tuple[Path, ...], stamps: tuple[Stamp, ...]) -> str:
    digest = hashlib.sha256()
    stored = _stored(paths, stamps)
    streams: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(stored):
            tensor = stored[name]
            if tensor.path not in streams:
                streams[tensor.path] = tensor.path.open("rb", buffering=0)
            header = json.dumps([name, tensor.dtype, tensor.shape])
            digest.update(header.encode() + b"\n")
            digest.update(_sample(streams[tensor.path], tensor))
    except OSError as error:
        raise UserError(
            f"{folder}: the weights cannot be read ({error}): copy the model again"
        ) from error
    finally:
        for stream in streams.values():
            stream.close()
    return digest.hexdigest()
