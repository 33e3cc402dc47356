"""Reads a small file once, and again only after it changed."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

from mixlora_exp.system.untrusted import read_bytes

SETTLED = 100_000_000
"""Age in nanoseconds from which a further change shows in a file's times on any file system whose
clock ticks faster than that."""
LARGE = 2**20
"""Files of more bytes are not kept in memory."""


Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Return numbers that differ if the file does: its place on disk, size and times. A file that
    was changed just now, or is missing, has other numbers each time it is asked for."""
    try:
        found = path.stat()
    except OSError:
        return (time.perf_counter_ns(),)
    settled = time.time_ns() - found.st_ctime_ns > SETTLED
    times = (found.st_mtime_ns, found.st_ctime_ns, 0 if settled else time.perf_counter_ns())
    return (found.st_dev, found.st_ino, found.st_size, *times)


def content(path: Path) -> bytes:
    """Return the content of a file, from memory if the file did not change since it was last read.

    Raises:
        OSError, ValueError: as `read_bytes`.
    """
    if path.stat().st_size > LARGE:
        return read_bytes(path)
    return _content(path.absolute(), stamp(path))


@lru_cache(maxsize=32)
def _content(path: Path, _: Stamp) -> bytes:
    return read_bytes(path)
