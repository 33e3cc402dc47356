"""Hash of the code that determines what a run computes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mixlora_exp.config.paths import PACKAGE
from mixlora_exp.records.canonical_code import meanings

ROOMS = (
    "adapters",
    "config",
    "data",
    "evaluation",
    "kernels",
    "models",
    "runs",
    "tasks",
    "training",
)
"""Subpackages that determine results. The others show, store, start, measure or plan runs."""
BESIDE = (
    "config/explain.py",
    "runs/base_choice.py",
    "runs/ownership.py",
    "runs/repeat.py",
    "training/checkpoints.py",
    "training/progress.py",
    "training/tracking.py",
)
"""Exceptions in these subpackages: files that explain mistakes, lock folders, store, report or
repeat."""


def _determining() -> list[tuple[str, Path]]:
    """Return the files that determine what a run computes, with their names in the package."""
    found = sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))
    named = [(path.relative_to(PACKAGE).as_posix(), path) for path in found]
    return [(name, path) for name, path in named if not name.startswith(BESIDE)]


def _hash(sources: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, meaning in meanings(sources).items():
        digest.update(name.encode())
        digest.update(meaning.encode())
    return digest.hexdigest()


@cache
def code_sha256() -> str:
    """Return SHA-256 of the code that determines results, independent of layout, comments,
    docstrings and the texts of exceptions (see `canonical_code.meanings`)."""
    return _hash({name: path.read_text(encoding="utf-8") for name, path in _determining()})
