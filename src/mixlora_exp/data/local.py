"""`data=local`: `<task>/<split>.jsonl`, `.jsonl.gz`, `.json` or `.parquet` under `data.path`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixlora_exp.data.loaded import DataFile, LoadedSplit, undecodable
from mixlora_exp.errors import UserError
from mixlora_exp.system.untrusted import (
    LIMIT,
    file_limit,
    open_regular,
    parse_json,
    raw_lines,
    read_bytes,
)
from mixlora_exp.tasks import TASKS, Task

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BATCH, PIECE = 256, 2**20
"""Rows of a parquet file that are decoded at once; bytes that are hashed at once."""
Seen = Callable[[bytes], object]


def load_local(root: str, spec: Task, split: str) -> LoadedSplit:
    """Read one split row by row.

    Raises:
        UserError: the split's file is missing, ambiguous, unreadable or empty, or a row is not
            valid.
    """
    task = spec.name
    file = _find(Path(root).expanduser(), task, split)
    digest = hashlib.sha256()
    read = {".parquet": _parquet_rows, ".json": _array_rows}.get(file.suffix, json_rows)
    items, kept = [], []
    for where, row in read(file, digest.update):
        kept.append(row)
        try:
            items.append(spec.read(row, len(items)))
        except ValueError as error:
            raise UserError(f"{where}: this is not a row of {task}: {error}") from None
    if not items:
        raise UserError(
            f"{file} has no rows: write the {split} rows of {task} there, or change data.path"
        )
    return LoadedSplit(items, [DataFile(str(file), len(items), digest.hexdigest())], kept)


def _find(root: Path, task: str, split: str) -> Path:
    """Return the split's file; a `UserError` lists what is there instead."""
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise UserError(
            f"data.path={root} {state}: give a folder that contains {task}/{split}.jsonl, "
            "or use data=hub or data=embedded"
        )
    folder = root / task
    if not folder.is_dir():
        there = [name for name in TASKS if (root / name).is_dir()]
        raise UserError(
            f"data.path={root} has no folder '{task}' (tasks there: {', '.join(there) or 'none'}): "
            f"add {task}/{split}.jsonl, or choose among the tasks there"
        )
    found = [file for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").is_file()]
    if not found:
        there = sorted(file.name for file in folder.iterdir() if file.name.endswith(SUFFIXES))
        raise UserError(
            f"data.path={root} has no {split} split of {task} "
            f"(in {task}/: {', '.join(there) or 'no data files'}): "
            f"add {task}/{split}.jsonl, .jsonl.gz, .json or .parquet, or choose other tasks than "
            f"{task}"
        )
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(
            f"data.path={root} contains {split} of {task} more than once ({names} in {task}/): "
            "keep one of them"
        )
    return found[0]


def json_rows(file: Path, seen: Seen = lambda _: None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a JSON-lines file with its `file:line`; blank lines are skipped. `seen`
    as in `raw_lines`.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object.
    """
    try:
        for line, raw in raw_lines(file, seen):
            if raw.strip():
                yield f"{file}:{line}", _object(raw, f"{file}:{line}")
    except ValueError as error:
        raise UserError(f"{file}: {error}: fix the file, or copy it to data.path again") from error
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error}): make it readable, or copy it to data.path again"
        ) from error


def _array_rows(file: Path, seen: Seen) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a JSON file that is a list of them, with its 1-based number; `seen` as
    in `raw_lines`."""
    try:
        content = read_bytes(file)
        seen(content)
        rows = parse_json(content, halves=True)
        if not isinstance(rows, list):
            raise ValueError(f"it is not a list of objects but a {type(rows).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): fix the file, or copy it to data.path again"
        ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"{file} row {number} is not a JSON object but a {type(row).__name__}: write each "
                "row as an object of fields by name"
            )
        yield f"{file} row {number}", row


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(raw, halves=True)
    except ValueError as error:
        raise UserError(
            f"{where}: this line is not JSON ({error}): each line must be one object"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: this line is not a JSON object but a {type(row).__name__}: write each row "
            "as an object of fields by name"
        )
    return row


def _parquet_rows(file: Path, seen: Seen) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a parquet file with its 1-based number; `seen` as in `raw_lines`."""
    import pyarrow
    import pyarrow.parquet

    row, unpacked = 0, 0
    try:
        with open_regular(file) as stream:
            # Parquet is not read in order, so its bytes are seen first, of the same open file.
            while piece := stream.read(PIECE):
                seen(piece)
            with pyarrow.parquet.ParquetFile(stream) as table:
                # Few rows at a time: a page of a few bytes can expand to any number of rows.
                for batch in table.iter_batches(batch_size=BATCH):
                    unpacked += batch.nbytes
                    if unpacked > file_limit():
                        raise ValueError(
                            f"rows up to {row + batch.num_rows} have more than "
                            f"{file_limit() / 2**20:g} MiB; {LIMIT}=N (MiB per file) allows more"
                        )
                    for content in _contents(batch, file, row):
                        row += 1
                        yield f"{file} row {row}", content
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as parquet ({error}): copy it to data.path again"
        ) from error


def _contents(batch: Any, file: Path, before: int) -> list[dict[str, Any]]:
    """Return the rows of a batch; `before`: number of rows before it in the file."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        row, name = undecodable(batch)
        raise UserError(
            f"{file} row {before + row + 1}: field '{name}' is not UTF-8 text ({error.reason}): "
            "encode it as UTF-8"
        ) from None
