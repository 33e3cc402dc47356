"""Checks of single values; each raises a `UserError` that names the field and its value."""

from __future__ import annotations

import os
from math import isfinite
from pathlib import Path
from re import fullmatch
from typing import Any

from mixlora_exp.errors import UserError, shown

MISSING: Any = "???"
"""OmegaConf's marker of a mandatory value, copied so that this file need not import OmegaConf."""
LONGEST_NAME = 255
"""Bytes of a file's or folder's name on the usual file systems."""


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


def require_short(name: str, value: str, ending: str = "") -> None:
    """Raise a `UserError` unless each part of the path `value` can be a file's name, also with
    `ending`."""
    for part in Path(value).parts:
        if len(os.fsencode(part + ending)) > LONGEST_NAME:
            raise UserError(
                f"{name}={shown(value, 160)}: this name is too long for a file: give a shorter one"
            )
