"""Headings of table blocks: settings in command-line syntax, and details for equal headings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def word(value: Any) -> str:
    """Return a setting's value in the syntax of the command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(word, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def short_hash(value: Any) -> str:
    """First eight hexadecimal digits of a value's SHA-256, for values too long for a heading."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def told_apart(headings: Sequence[str], details: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the headings; equal ones are followed by the details in which they differ."""
    found = []
    for heading, own in zip(headings, details, strict=True):
        alike = [d for h, d in zip(headings, details, strict=True) if h == heading]
        names = sorted(set().union(*alike))
        odd = [n for n in names if any(d.get(n) != own.get(n) for d in alike)]
        found.append(", ".join([heading, *(f"{n}={word(own.get(n))}" for n in odd)]))
    return found
