"""Whether the texts of a row are texts: a file can hold half of a character."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_characters"]


def check_characters(row: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the first field with half a character (a lone surrogate) in
    it, at any depth: no tokenizer takes it, and it has no bytes by which a row could be hashed."""
    # Not by recursion, for a row may be nested more deeply than that goes.
    left: list[tuple[str, Any]] = [("", row)]
    while left:
        where, found = left.pop()
        if isinstance(found, str):
            try:
                found.encode()
            except UnicodeEncodeError as error:
                half = ord(found[error.start])
                raise ValueError(
                    f"field '{where}' holds half a character (U+{half:04X}): write it whole"
                ) from None
        elif isinstance(found, Mapping):
            names = [("(name of a field)", name) for name in found]
            inside = [(f"{where}.{name}".lstrip("."), entry) for name, entry in found.items()]
            left += reversed(names + inside)
        elif isinstance(found, Sequence) and not isinstance(found, bytes):
            left += reversed([(f"{where}[{i}]", entry) for i, entry in enumerate(found)])
