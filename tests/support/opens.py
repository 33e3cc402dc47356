"""Counts how often files are opened, by Python's own account."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_watched: list[tuple[Path, Counter[str]]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _watched or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = Path(os.path.abspath(os.fsdecode(arguments[0])))
    for folder, found in _watched:
        if folder in path.parents:
            found[path.relative_to(folder).as_posix()] += 1


# An audit hook cannot be removed: there is one, which does nothing outside `opens_below`.
sys.addaudithook(_note)


@contextmanager
def opens_below(folder: Path) -> Iterator[Counter[str]]:
    """How often each file below `folder` is opened within this context, by its path from there.
    Libraries in C or Rust that open files by themselves (safetensors, tokenizers) do not count."""
    found: Counter[str] = Counter()
    _watched.append((folder.absolute(), found))
    try:
        yield found
    finally:
        _watched.pop()
