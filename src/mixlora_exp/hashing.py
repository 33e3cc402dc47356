"""Hashes of files, and of the code that determines results."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

__all__ = ["code_sha256", "file_sha256"]

PACKAGE = Path(__file__).parent
BESIDE = frozenset(
    (
        "bench", "cli.py", "continuing.py", "durable.py", "errors.py", "generation.py",
        "interruption.py", "jobs.py", "ledger.py", "lm_eval.py", "memory.py", "planning.py",
        "reporting.py", "rescoring.py", "results", "runlock.py", "search.py", "search_study.py",
        "serving.py", "status.py", "sweep.py", "training/checkpoints.py", "training/progress.py",
        "training/sinks.py", "training/tracking.py", "underway.py",
    )
)  # fmt: skip
"""Code that shows, stores, starts or measures runs; all else decides what a run computes."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _meaning(source: str) -> str:
    """The program without its comments, layout and docstrings, the same from every Python."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:] or [ast.Pass()]
    return _dump(tree)


def _dump(node: object) -> str:
    """The tree as text. Fields without a value are left out: Pythons differ in which there are."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (
        f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])
    )
    kept = "=None" if isinstance(node, ast.Constant) and node.value is None else ""
    return f"{type(node).__name__}{kept}({','.join(fields)})"


def _determining() -> list[tuple[str, Path]]:
    """The files that decide what a run computes, with their names in the package."""
    found = sorted((path.relative_to(PACKAGE).as_posix(), path) for path in PACKAGE.rglob("*.py"))
    return [
        (name, path)
        for name, path in found
        if name not in BESIDE and name.partition("/")[0] not in BESIDE
    ]


@cache
def code_sha256() -> str:
    """Hash of the code that determines results: what it does, not how it is laid out."""
    digest = hashlib.sha256()
    for name, path in _determining():
        digest.update(name.encode())
        digest.update(_meaning(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()
