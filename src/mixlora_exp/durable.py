"""Folders that are on the disk, and readable for others, before they are called finished."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["settle", "sync"]


def sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(folder: Path) -> None:
    """Write a folder of files to the disk, each with the permissions that new files have here.

    safetensors makes files that nobody else may read, and runs may be continued by others.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
            sync(path)
    sync(folder)
