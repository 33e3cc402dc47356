"""Objections to a record's use in tables, known before a run and checked after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = 3
UNPLACED = "origin unknown: no record has the hash of its adapter"
"""Objection that --force cannot override: no table has a cell for such a run."""


def _code(git: Mapping[str, Any] | None) -> list[str]:
    if git is None:
        return ["code in no git checkout"]
    if not git["dirty"]:
        return []
    names = list(git.get("changed", ()))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ["uncommitted changes" + (f" in {', '.join(names[:SHOWN])}{more}" if names else "")]


def objections(record: Mapping[str, Any]) -> list[str]:
    """Return reasons against a record in the tables; empty if `make collect` accepts it without
    force.

    Uses only `config.model`, `provenance.git` and `adapter`, which are known before a run.
    """
    found = code_objections(record)
    if has_random_weights(record):
        found.append("random weights: its scores mean nothing")
    return found


def has_random_weights(record: Mapping[str, Any]) -> bool:
    """Return whether a run was a trial, on a base model of random weights."""
    model = record["config"]["model"]
    return model["weights"] == "random" or (model["path"] is None and model["source"] == "random")


def code_objections(record: Mapping[str, Any]) -> list[str]:
    """Return objections to the code that trained and scored; tables use such a record only if it
    was collected with --force."""
    found = _code(record["provenance"]["git"])
    adapter = record.get("adapter")
    if adapter is not None:
        source = adapter.get("trained_by")
        if source is None:
            found.append(UNPLACED)
        else:
            found += [f"an adapter that was trained with {why}" for why in _code(source["git"])]
    return found
