"""Results of scored batches in a file, so that an interrupted scoring goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_exp.evaluation import ItemScore
from mixlora_exp.system.untrusted import parse_json, read_bytes

Kept = tuple[list[Any], dict[str, list[list[float]]]]
"""Results of a batch's items, and by group how often each expert was chosen (layers, E)."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a line of the file says of a batch; `seconds`: what it took."""

    results: list[Any]
    counts: dict[str, list[list[float]]]
    seconds: float


class KeptBatches:
    """Results by batch of one scoring, which `identity` names: model, settings and data.

    A line is appended when a batch is scored. It has a hash, so that one that was cut off, or
    belongs to another scoring, is as if it were not there. Nothing is kept any more once a line
    cannot be written: the record, which is written later, reports a failing disk. check: raises if
    this process may not write into the run any more.
    """

    def __init__(self, path: Path, identity: Any, check: Callable[[], None]) -> None:
        self._path, self._own, self._check = path, _hash(identity), check
        self._found = self._read()
        self._calls = 0
        self._writes = True
        self._since = time.perf_counter()
        self.seconds = 0.0
        """What the batches of earlier starts took whose results were used."""

    def __len__(self) -> int:
        """Number of batches of earlier starts."""
        return len(self._found)

    def next_call(self) -> int:
        """Return the number of a list of batches, of which a scoring may have several."""
        self._calls += 1
        return self._calls

    def name_of(self, call: int, number: int, keys: Sequence[str], lengths: Sequence[int]) -> str:
        """Return the name of a batch, the `number`-th of its list, of these items and numbers of
        tokens."""
        return f"{self._own} {_hash([call, number, list(keys), list(lengths)])}"

    def has(self, name: str, size: int) -> bool:
        """Return whether an earlier start had a batch of `size` items. If not, its time begins
        now."""
        self._since = time.perf_counter()
        return name in self._found and len(self._found[name].results) == size

    def find(self, name: str) -> Kept:
        """Return what an earlier start, which had this batch, found for it."""
        entry = self._found[name]
        self.seconds += entry.seconds
        return entry.results, entry.counts

    def add(
        self, name: str, results: Sequence[Any], counts: Mapping[str, list[list[float]]]
    ) -> None:
        """Append the batch that was asked for last, unless an earlier start had it.

        Raises:
            UserError: another process has taken the run over.
        """
        if name in self._found or not self._writes:
            return
        self._check()
        entry = {
            "name": name,
            "results": [_plain(r) for r in results],
            "counts": dict(counts),
            "seconds": round(time.perf_counter() - self._since, 3),
        }
        line = json.dumps({**entry, "sha256": _hash(entry)})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                # Begins a line, since that of a killed start may have no end.
                stream.write(f"\n{line}")
        except OSError:
            self._writes = False

    def _read(self) -> dict[str, _Entry]:
        try:
            lines = read_bytes(self._path).splitlines()
        except (OSError, ValueError):
            return {}
        found = {}
        for line in lines:
            try:
                entry = parse_json(line, finite=False)
                own = entry["name"].partition(" ")[0] == self._own
                if entry.pop("sha256") == _hash(entry) and own:
                    found[entry["name"]] = _Entry(
                        [_back(result) for result in entry["results"]],
                        {group: _counts(layers) for group, layers in entry["counts"].items()},
                        float(entry["seconds"]),
                    )
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, ItemScore):
        return {"item": _plain(dataclasses.asdict(value))["fields"]}
    if isinstance(value, dict):
        return {"fields": {name: _plain(inner) for name, inner in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_plain(inner) for inner in value]}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _back(value: Any) -> Any:
    if isinstance(value, list):
        return [_back(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(map(_back, inner))
    fields = {name: _back(one) for name, one in inner.items()}
    return ItemScore(**fields) if kind == "item" else fields


def _counts(layers: Any) -> list[list[float]]:
    found = [[float(count) for count in layer] for layer in layers]
    if len({len(layer) for layer in found}) > 1:
        raise ValueError("layers have different numbers of experts")
    return found


def _hash(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
