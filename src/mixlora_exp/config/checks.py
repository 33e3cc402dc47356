"""Checks of single values; each raises a `UserError` that names the field and its value."""

from __future__ import annotations

import os
from math import isfinite
from pathlib import Path
from re import fullmatch
from typing import Any

from mixlora_exp.config.typed import literal
from mixlora_exp.errors import UserError, shown

MISSING: Any = "???"
"""OmegaConf's marker of a mandatory value, copied so that this file need not import OmegaConf."""
LONGEST_NAME = 255
"""Bytes of a file's or folder's name on the usual file systems."""


class InvalidValue(UserError):
    """A value that a field does not take. `source`: the file that sets it, as ` (in FILE)`."""

    def __init__(self, name: str, value: object, rule: str, source: str = "") -> None:
        plain = value is None or isinstance(value, (bool, list, dict))
        typed = literal(value) if plain else value
        super().__init__(f"{name}={typed}{source} is not valid: {rule}")
        self.name, self.value, self.rule, self.source = name, value, rule, source

    def __reduce__(self) -> tuple[Any, ...]:
        # Processes of a sweep hand errors on.
        return type(self), (self.name, self.value, self.rule, self.source)


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise a `UserError` with field, value and violated `rule` unless `condition` holds."""
    if not condition:
        raise InvalidValue(name, value, rule)


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
