"""Checks the texts of a row for lone surrogates (halves of characters)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_characters(row: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the first field, at any depth, with a lone surrogate, which
    no tokenizer accepts and which cannot be encoded to hash the row."""
    # Iteratively, since deep nesting would exceed the recursion limit.
    left: list[tuple[str, Any]] = [("", row)]
    while left:
        where, found = left.pop()
        if isinstance(found, str):
            try:
                found.encode()
            except UnicodeEncodeError as error:
                half = ord(found[error.start])
                raise ValueError(
                    f"field '{where}' contains half a character (U+{half:04X}): write it as one "
                    "character"
                ) from None
        elif isinstance(found, Mapping):
            names = [("(name of a field)", name) for name in found]
            inside = [(f"{where}.{name}".lstrip("."), entry) for name, entry in found.items()]
            left += reversed(names + inside)
        elif isinstance(found, Sequence) and not isinstance(found, bytes):
            left += reversed([(f"{where}[{i}]", entry) for i, entry in enumerate(found)])
