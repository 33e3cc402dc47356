"""The record of a run: provenance, content hash, atomic writing and verified reading.

Imports neither torch nor Hydra, so that tables can be built without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from mixlora_exp.errors import UserError
from mixlora_exp.records.checkout import git_state
from mixlora_exp.records.files import PACKED, RECORD, RunFiles
from mixlora_exp.records.required_fields import check_shape
from mixlora_exp.system.durable import write_whole
from mixlora_exp.system.untrusted import parse_json, read_bytes

SCHEMA_VERSION = 1
"""Incremented when fields of the record change their meaning."""

_HASH = "content_sha256"

_PACKAGES = (
    "mixlora-exp",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "hydra-core",
    "omegaconf",
    "gguf",
    "bitsandbytes",
    "torchao",
    "numpy",
    "pandas",
    "lm-eval",
)


def provenance(repo_root: Path | str, gpu_names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the code, packages and hardware behind a result.

    `git` is null outside a checkout, see `git_state`. The version of a package that is not
    installed is null.
    """
    return {
        "git": git_state(Path(repo_root)),
        "python": platform.python_version(),
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "hardware": hardware(gpu_names),
    }


def hardware(gpu_names: Sequence[str] = ()) -> dict[str, Any]:
    """Return a description of this machine, with the names of its GPUs."""
    return {
        "cpu": _cpu_model(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": _usable_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "gpus": list(gpu_names),
    }


def finish_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as plain JSON values, with `schema_version` and `content_sha256`.

    NaN and infinity, which JSON lacks, become null.
    """
    content = {name: value for name, value in _plain(record).items() if name != _HASH}
    content["schema_version"] = SCHEMA_VERSION
    return {**content, _HASH: _content_hash(content)}


def read_record(source: Path | str | RunFiles) -> dict[str, Any]:
    """Return the record in a JSON file, a packed run, or the opened files of a run.

    Raises:
        UserError: the file cannot be read, has another schema version, or was changed.
    """
    path = source.path if isinstance(source, RunFiles) else Path(source)
    try:
        if isinstance(source, RunFiles):
            content = source.read(RECORD)
        else:
            content = RunFiles(path).read(RECORD) if path.suffix == PACKED else read_bytes(path)
        # Paths may contain bytes that are not UTF-8, which Python represents as lone surrogates.
        record = parse_json(content, halves=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot read the record {path}: {reason}; give the folder of a finished run"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not a record: it is truncated or not valid JSON ({error}); "
            "run the experiment again with force=true"
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{path} is not a record but another JSON value; run the experiment again with "
            "force=true"
        )
    version = record.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version={version} is of a later version of mixlora-exp: use that one"
        )
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version={version} is not supported, only "
            f"schema_version={SCHEMA_VERSION}; run the experiment again with force=true"
        )
    content = {name: value for name, value in record.items() if name != _HASH}
    if record.get(_HASH) != _content_hash(content):
        raise UserError(
            f"{path} was changed after it was written ({_HASH} does not match its content); "
            "restore it or run the experiment again with force=true"
        )
    return record


def read_run(source: Path | str | RunFiles) -> dict[str, Any]:
    """Return the record of a run as `read_record`, with fields checked against
    `records.required_fields`.

    Raises:
        UserError: the file was changed, or a field is missing or has the wrong type.
    """
    record = read_record(source)
    try:
        check_shape(record)
    except UserError as error:
        path = source.path if isinstance(source, RunFiles) else source
        raise UserError(f"{path} is not the record of a run: {error}") from error
    return record


def write_json(path: Path | str, data: Mapping[str, Any]) -> None:
    """Write one JSON object atomically.

    Raises:
        UserError: the file cannot be written; an existing one is unchanged.
    """
    write_text(path, json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically like `write_json`."""
    lines = (json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
    write_whole(Path(path), map(str.encode, lines))


def write_text(path: Path | str, content: str) -> None:
    """Write a text file, atomically like `write_json`."""
    write_whole(Path(path), [content.encode()])


def _plain(value: Any) -> Any:
    """Return `value` as it would be read back from JSON; non-finite numbers become None."""
    match value:
        case Enum():
            return _plain(value.value)
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case Path():
            return str(value)
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"a record's keys are text, not {key!r}")
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    raise TypeError(f"a record cannot hold {type(value).__name__}: {value!r}")


def _content_hash(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_threads() -> int | None:
    """Return the number of hardware threads this process may use, which a container may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
