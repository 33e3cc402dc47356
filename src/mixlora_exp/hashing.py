"""Hashes of files, and of the code that determines results."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

__all__ = ["code_sha256", "file_sha256"]

PACKAGE = Path(__file__).parent
DETERMINING = ("adapters", "data", "evaluation", "kernels", "models", "tasks", "training")
"""The rooms whose code decides what a run computes."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _meaning(source: str) -> str:
    """The program without its comments, layout and docstrings."""
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
    return ast.dump(tree)


@cache
def code_sha256() -> str:
    """Hash of the code that determines results: what it does, not how it is laid out."""
    digest = hashlib.sha256()
    for room in DETERMINING:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode())
            digest.update(_meaning(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()
