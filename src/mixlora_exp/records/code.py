"""Hash of the code that decides what a run computes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mixlora_exp.records.meaning import meanings

PACKAGE = Path(__file__).parents[1]
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
"""What decides a result. The other rooms show, store, start, measure or plan runs."""
BESIDE = (
    "config/explain.py",
    "runs/base_choice.py",
    "runs/ownership.py",
    "training/checkpoints.py",
    "training/progress.py",
    "training/tracking.py",
)
"""What in these rooms explains a mistake, chooses words, locks folders, stores or reports."""


def _determining() -> list[tuple[str, Path]]:
    """The files that decide what a run computes, with their names in the package."""
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
    """Hash of the code that determines results: what it does, not how it is laid out, documented
    or told of in errors."""
    return _hash({name: path.read_text(encoding="utf-8") for name, path in _determining()})
