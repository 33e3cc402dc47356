"""The items of a split, with the hashes of the files they came from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixlora_exp.tasks import Item


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file, hub split or generated split, with its row count and hash."""

    path: str
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LoadedSplit:
    """The items of one split of a task, in the official order, with their original rows."""

    items: list[Item]
    files: list[DataFile]
    rows: list[Mapping[str, Any]] = field(default_factory=list, repr=False)

    def limited(self, limit: int | None, seed: int) -> LoadedSplit:
        """Return the first `limit` items of a shuffle by `seed`; None: all items in their order."""
        if limit is None:
            return self
        return self._shuffled(seed, slice(limit))

    def held_out(self, after: int, limit: int | None, seed: int) -> LoadedSplit:
        """Return the first `limit` items that `limited(after, seed)` excludes, on which to tune
        settings."""
        return self._shuffled(seed, slice(after, None if limit is None else after + limit))

    def _shuffled(self, seed: int, part: slice) -> LoadedSplit:
        order = list(range(len(self.items)))
        random.Random(seed).shuffle(order)
        kept = order[part]
        rows = [self.rows[i] for i in kept] if self.rows else []
        return LoadedSplit([self.items[i] for i in kept], self.files, rows)


def hash_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return SHA-256 of the rows as canonical JSON lines, independent of how they were stored."""
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def undecodable(table: Any) -> tuple[int, str]:
    """Row (from 0) and field of the first value of an Arrow table that is not UTF-8; Arrow's own
    error does not locate it."""
    for row in range(table.num_rows):
        for name, column in zip(table.schema.names, table.columns, strict=True):
            try:
                column[row].as_py()
            except UnicodeDecodeError:
                return row, name
    raise ValueError("every value is UTF-8")
