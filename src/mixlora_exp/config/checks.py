"""Checks of single values; each raises a `UserError` that names the field and its value."""

from __future__ import annotations

from math import isfinite
from re import fullmatch
from typing import Any

from mixlora_exp.errors import UserError

MISSING: Any = "???"
"""OmegaConf's marker of a mandatory value, copied so that this file need not import OmegaConf."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise a `UserError` with field, value and violated `rule` unless `condition` holds."""
    if not condition:
        raise UserError(f"{name}={'null' if value is None else value} is not valid: {rule}")


def require_positive(name: str, value: float, zero: bool = False) -> None:
    """Raise a `UserError` unless `value` is finite and positive (`zero`: or zero)."""
    valid = isfinite(value) and (value >= 0 if zero else value > 0)
    require(valid, name, value, f"must be {'>=' if zero else '>'} 0 and finite")


def require_name(name: str, value: str) -> None:
    """Raise a `UserError` unless `value` can be part of a file name."""
    valid = fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value) is not None
    require(valid, name, value, "use letters, digits, '_', '.' and '-' only")
