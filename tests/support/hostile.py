"""Files that no reader may hang on, crash on, or fill the memory for."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixlora_exp.records.record import finish_record, read_record, write_json

ESCAPE = "\x1b[2J\u202e"
BYTES = {
    "deep": b'{"a":' * 100_000,
    "deep and whole": b'{"a":' * 300 + b"1" + b"}" * 300,
    "a line of megabytes": b'{"a": "' + b"b" * 3 * 2**20 + b'"}',
    "a number of thousands of digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "NaN": b'{"schema_version": NaN}',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "a field twice": b'{"a": 1, "a": 2}',
    "half of a character": b'{"schema_version": "\\ud800"}',
    "escapes": json.dumps({"schema_version": ESCAPE, ESCAPE: ESCAPE}).encode(),
    "a list": b"[1, 2]",
    "nothing": b"",
}
HOSTILE = ("a pipe", "a device", "a folder", *BYTES)


def place(kind: str, path: Path) -> None:
    """Put one of them there, packed where the name asks for it, instead of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    else:
        path.write_bytes(gzip.compress(BYTES[kind]) if path.suffix == ".gz" else BYTES[kind])


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A run's folder, its record with another content and the hash that fits it."""
    record = read_record(folder / "record.json")
    change(record)
    write_json(folder / "record.json", finish_record(record))
    return folder


def set_field(dotted: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """What gives a field of a record another value."""

    def change(record: dict[str, Any]) -> None:
        *parents, last = dotted.split(".")
        for parent in parents:
            record = record[parent]
        record[last] = value

    return change
