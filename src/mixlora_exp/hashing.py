"""Hashes of files, and of the code that determines results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mixlora_exp.meaning import meanings
from mixlora_exp.untrusted import open_regular

__all__ = ["code_sha256", "file_sha256"]

PACKAGE = Path(__file__).parent
BESIDE = frozenset(
    (
        "basechoice.py", "bench", "cli.py", "config/explain.py", "continuing.py", "durable.py",
        "errors.py", "generation.py", "interruption.py", "jobs.py", "ledger.py", "lm_eval.py",
        "meaning.py", "memory.py", "mergecheck.py", "merging.py", "planning.py", "reporting.py",
        "rescoring.py", "results", "runlock.py", "search.py", "search_study.py", "serving.py",
        "status.py", "sweep.py", "training/checkpoints.py", "training/progress.py",
        "training/sinks.py", "training/tracking.py", "underway.py", "untrusted.py",
    )
)  # fmt: skip
"""Code that shows, stores, starts or measures runs; all else decides what a run computes."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _determining() -> list[tuple[str, Path]]:
    """The files that decide what a run computes, with their names in the package."""
    found = sorted((path.relative_to(PACKAGE).as_posix(), path) for path in PACKAGE.rglob("*.py"))
    return [
        (name, path)
        for name, path in found
        if name not in BESIDE and name.partition("/")[0] not in BESIDE
    ]


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
