"""Texts and folders on command lines, as they were typed: one rule for all commands.

What follows `=` in a field that holds a folder or a text needs quotes only for the shell. Left to
Hydra's grammar are `null`, lists, values in Hydra's own quotes and, unless a file has that name,
several values (`A,B`) and interpolations (`${output_dir}`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

FOLDERS = ("adapter", "output_dir", "data.path", "data.mirror", "model.path")
NO_TEXT = ("true", "false", "null", "nan", "inf")
"""Without quotes Hydra reads these otherwise, in any case."""
TEXTS = ("prompt", "prompts")
"""Not even quotes, lists or several values are left to Hydra."""


def as_typed(words: Sequence[str]) -> list[str]:
    """Return the arguments of a command, in Hydra's grammar where that would read a folder or a
    text otherwise than it was typed."""
    return [_as_typed(word) for word in words]


def _as_typed(word: str) -> str:
    name, equals, value = word.partition("=")
    if not equals or value == "null" or name not in (*FOLDERS, *TEXTS):
        return word
    quoted = f"{name}={literal(value)}"
    if name in TEXTS:
        return quoted
    # A benchmark runs without Hydra and reads records, whose check comes from here.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        (parsed,) = OverridesParser.create().parse_overrides([word])
    except OverrideParseException:
        return quoted
    if not parsed.is_sweep_override() and parsed.value() == value and "${" not in value:
        return word
    by_hydra = value.startswith(("[", "'", '"')) or "," in value or "${" in value
    return word if by_hydra and not Path(value).expanduser().exists() else quoted


def typed_texts(value: str) -> list[str]:
    """Return the values of `name=[a,b]` or `name=a` as typed, without quotes. `null`: none."""
    if value == "null":
        return []
    listed = value.startswith("[") and value.endswith("]")
    return [entry.strip(" '\"") for entry in (value[1:-1].split(",") if listed else [value])]


def literal(value: Any) -> str:
    """Return a plain value in the syntax of Hydra's command line, which parses back to the same
    value: no interpolation in it is resolved. A text that is a name has no quotes."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case Enum():
            return literal(value.value)
        case list() | tuple():
            return "[" + ",".join(map(literal, value)) + "]"
        case Mapping():
            return "{" + ",".join(f"{key}:{literal(item)}" for key, item in value.items()) + "}"
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(value)) and str(value).lower() not in NO_TEXT:
        return str(value)
    # OmegaConf resolves `${` unless a backslash precedes it; backslashes already there are doubled.
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", str(value))
    # Hydra reads a backslash literally, except before a quote.
    text = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"'{text}'"
