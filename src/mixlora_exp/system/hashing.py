"""Hashes of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mixlora_exp.system.untrusted import open_regular


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
