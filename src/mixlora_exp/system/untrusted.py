"""Reads untrusted files as data, within limits.

All JSON that commands read passes through here: records, predictions, configurations of adapters
and models, rows of data, files of other processes. Refused content raises `ValueError` with a
clause for a message ("it is a pipe, not a file"); files that cannot be opened raise `OSError`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mixlora_exp.errors import UserError, shown

LIMIT = "MIXLORA_EXP_READ_LIMIT"
"""Environment variable: maximum size of a file in MiB, decompressed. For a line: 1/32 of it."""
DEFAULT_MIB, LINES = 256, 32
DEPTH = 64
"""Maximum nesting of lists and objects; real files have fewer than ten levels."""
LARGEST = 10**40
"""Maximum absolute value of an integer; some tools write 10**30 for "no limit"."""
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def file_limit() -> int:
    """Maximum size of a file in bytes, decompressed.

    Raises:
        UserError: the environment variable is not a number of MiB.
    """
    given = os.environ.get(LIMIT, str(DEFAULT_MIB))
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", given) is None:
        raise UserError(
            f"{LIMIT}={given} is not valid: give a number of MiB, for example {DEFAULT_MIB}"
        )
    return int(given) * 2**20


def line_limit() -> int:
    """Return the maximum length of one line of an input file, in bytes."""
    return file_limit() // LINES


def _too_large(what: str, limit: int) -> ValueError:
    return ValueError(
        f"{what} more than {limit / 2**20:g} MiB; {LIMIT}=N (MiB per file) allows more"
    )


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "something else")


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; pipes and devices, which may block forever, are refused.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not a regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        # The file may be replaced between the check and the opening.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as stream:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                yield stream
                return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "it is a folder", str(path))
    raise ValueError(f"it is {_kind(mode)}, not a file")


def refuse_links(path: Path, below: Path) -> None:
    """Refuse a path with a symbolic link at `below` or further inside, which could lead anywhere.

    Raises:
        ValueError: there is one.
    """
    inner = path.relative_to(below)
    for place in (below, *(below / part for part in reversed(inner.parents)), path):
        if place.is_symlink():
            raise ValueError(f"{place} is a link, which is not followed")


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, `file_limit()` if none is
    given.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or too large.
    """
    limit = file_limit() if limit is None else limit
    with open_regular(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise _too_large("it has", limit)
    return content


def _decoded(content: bytes, halves: bool = False) -> str:
    try:
        # Some programs encode each half of a surrogate pair separately.
        return content.decode("utf-8-sig", errors="surrogatepass" if halves else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8 text") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice, 80)} occurs twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def parse_json(content: bytes | str, *, halves: bool = False, finite: bool = True) -> Any:
    """Return the value of a JSON text, with finite numbers, unique fields and limited nesting.

    `halves`: accept lone surrogates (`\\ud800`), if the caller reports the field. `finite=False`:
    accept NaN and infinities, which Python writes although JSON lacks them, and integers of any
    size, if the caller checks them.

    Raises:
        ValueError: it is not JSON, or violates one of these rules.
    """
    text = _decoded(content, halves) if isinstance(content, bytes) else content
    constant = _no_number if finite else float
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, line {error.lineno} column {error.colno}") from error
    except ValueError as error:
        if "digit" in str(error):
            raise ValueError("a whole number has thousands of digits") from error
        raise
    _check(value, halves, finite)
    return value


def _check(value: Any, halves: bool, finite: bool) -> None:
    """Check all nested values; iteratively, since deep nesting could exceed the recursion limit."""
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            raise ValueError(f"it is nested deeper than {DEPTH} levels")
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                inner.extend(entry)
                inner.extend(entry.values())
            elif isinstance(entry, list):
                inner.extend(entry)
            elif isinstance(entry, str):
                if not halves and not entry.isascii():
                    _check_characters(entry)
            elif isinstance(entry, float):
                if finite and not math.isfinite(entry):
                    raise ValueError("a number is too large for float64")
            elif finite and isinstance(entry, int) and abs(entry) > LARGEST:
                raise ValueError("an integer has more than 40 digits")
        level, depth = inner, depth + 1


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {shown(text, 80)} contains half of a character (a lone surrogate)"
        ) from error


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Return the value of a JSON file; see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, too large, or not valid JSON.
    """
    return parse_json(read_bytes(path), finite=finite)


class _Seen:
    """A stream that gives the bytes that are read from it to a function, too."""

    def __init__(self, stream: BinaryIO, seen: Callable[[bytes], object]) -> None:
        self._stream, self._seen = stream, seen

    def read(self, size: int = -1) -> bytes:
        return self._noted(self._stream.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._noted(self._stream.readline(size))

    def _noted(self, content: bytes) -> bytes:
        self._seen(content)
        return content


def raw_lines(
    path: Path, seen: Callable[[bytes], object] = lambda _: None
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers from 1, decompressed if its name ends with
    `.gz`; only one line at a time is in memory. `seen` is called with the file's own bytes, piece
    by piece: all of them, once the lines are exhausted.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, damaged, or too large; the clause names the line.
    """
    longest, largest = line_limit(), file_limit()
    number = total = 0
    with open_regular(path) as opened:
        stream: Any = _Seen(opened, seen)
        source = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream
        while True:
            try:
                line = source.readline(longest + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"the gzip file is damaged or truncated after line {number} ({error})"
                ) from error
            if not line:
                return
            number, total = number + 1, total + len(line)
            if len(line) > longest:
                raise _too_large(f"line {number} has", longest)
            if total > largest:
                raise _too_large(f"up to line {number} there are", largest)
            yield number, line


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON-lines file, with their line numbers; blank lines are skipped.

    Raises:
        OSError: it cannot be read.
        ValueError: as `raw_lines`, or a line is not JSON; the clause names the line.
    """
    for number, line in raw_lines(path):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield number, value
