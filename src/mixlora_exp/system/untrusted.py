"""Files that anybody may have written: read as data within stated limits, or refused in a clause.

Every JSON that a command reads comes through here: records, predictions, adapters' and models'
configurations, rows of data, notes of other processes. What is refused raises `ValueError` with a
clause that a message can hold ("it is a pipe, no file"); what cannot be opened raises `OSError`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mixlora_exp.errors import UserError, shown

__all__ = [
    "LIMIT",
    "file_limit",
    "json_lines",
    "line_limit",
    "open_regular",
    "parse_json",
    "raw_lines",
    "read_bytes",
    "read_json",
    "read_text",
    "refuse_links",
]

LIMIT = "MIXLORA_EXP_READ_LIMIT"
"""Environment variable: how many MiB a file may have, unpacked. A line may have a 32nd of it."""
DEFAULT_MIB, LINES = 256, 32
DEPTH = 64
"""Levels of lists and objects; what is written by anybody's tools has under ten."""
LARGEST = 10**40
"""Whole numbers beyond it cannot be meant; some tools write 10**30 for "no limit"."""
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def file_limit() -> int:
    """Bytes that a file may have, unpacked.

    Raises:
        UserError: the environment variable is no number of MiB.
    """
    given = os.environ.get(LIMIT, str(DEFAULT_MIB))
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", given) is None:
        raise UserError(f"{LIMIT}={given} is not valid: give a number of MiB, {DEFAULT_MIB} say")
    return int(given) * 2**20


def line_limit() -> int:
    """Bytes that a line of a file may have."""
    return file_limit() // LINES


def _too_large(what: str, limit: int) -> ValueError:
    return ValueError(f"{what} more than {limit / 2**20:g} MiB; {LIMIT}=N (MiB a file) allows more")


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "something else")


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """The file opened for reading; a pipe or a device, on which reading may wait for ever, is not.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        # Between the look and the opening another thing may have taken its place.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as stream:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                yield stream
                return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "it is a folder", str(path))
    raise ValueError(f"it is {_kind(mode)}, no file")


def refuse_links(path: Path, below: Path) -> None:
    """Refuse a path on which a link stands between the folder `below` (itself included) and its
    end: it could lead anywhere.

    Raises:
        ValueError: it does.
    """
    inner = path.relative_to(below)
    for place in (below, *(below / part for part in reversed(inner.parents)), path):
        if place.is_symlink():
            raise ValueError(f"{place} is a link, which is not followed")


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes, `file_limit()` if none is given.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or too large.
    """
    limit = file_limit() if limit is None else limit
    with open_regular(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise _too_large("it has", limit)
    return content


def read_text(path: Path) -> str:
    """The text of a regular file in UTF-8, with or without a mark at its beginning.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, or no UTF-8.
    """
    return _decoded(read_bytes(path))


def _decoded(content: bytes, halves: bool = False) -> str:
    try:
        # Some programs write each half of a character by itself.
        return content.decode("utf-8-sig", errors="surrogatepass" if halves else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is no UTF-8 text") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice, 80)} stands there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def parse_json(content: bytes | str, *, halves: bool = False, finite: bool = True) -> Any:
    """The value of a JSON text: of finite numbers, fields that stand there once, and few levels.

    `halves`: let lone surrogates (halves of characters, as `\\ud800`) through, where the caller
    tells the field in which they are. `finite=False`: let NaN, infinities, which Python writes
    and JSON does not have, and whole numbers of any size through, where the caller looks at them.

    Raises:
        ValueError: it is no JSON, or has something that no reader here could use.
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
    """Look at every value in it; not by recursion, which the value itself could exhaust."""
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
                    raise ValueError("a number is too large to be one")
            elif finite and isinstance(entry, int) and abs(entry) > LARGEST:
                raise ValueError("a whole number has more than 40 digits")
        level, depth = inner, depth + 1


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {shown(text, 80)} holds half of a character (a lone surrogate)"
        ) from error


def read_json(path: Path, *, halves: bool = False, finite: bool = True) -> Any:
    """The value of a JSON file; see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, or no JSON that can be used.
    """
    return parse_json(read_bytes(path), halves=halves, finite=finite)


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, unpacked if its name ends with `.gz`, with their numbers from 1. Never
    more than one of them is in memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, damaged, or too large; the clause names the line.
    """
    longest, largest = line_limit(), file_limit()
    number = total = 0
    with open_regular(path) as stream:
        source = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream
        while True:
            try:
                line = source.readline(longest + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"the gzip file is damaged or cut off after line {number} ({error})"
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
    """The values of a file with one JSON text on each line, and the lines' numbers; blank lines
    are passed over.

    Raises:
        OSError: it cannot be read.
        ValueError: as `raw_lines`, or a line is no JSON; the clause names the line.
    """
    for number, line in raw_lines(path):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield number, value
