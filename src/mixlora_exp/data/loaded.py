"""What a source hands over: the items of a split, and which bytes they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mixlora_exp.tasks import Item

__all__ = ["DataFile", "LoadedSplit", "hash_rows"]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file (or a hub split, or a generated split) with its row count and its hash."""

    path: str
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LoadedSplit:
    """The items of one split of one task, in the official order."""

    items: list[Item]
    files: list[DataFile]


def hash_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows as canonical JSON lines: the same rows give the same hash, wherever
    they were stored."""
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
