"""Hashes of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mixlora_exp.system.untrusted import open_regular


def file_sha256(*paths: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; of several, that of their joined content."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
