"""Reads single fields of a row: returns a checked value, or raises `ValueError` with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixlora_exp.tasks.base import LETTERS

INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"
"""Invisible characters that `str.strip` keeps: byte order mark and zero-width characters."""


def value(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of field `name`, which must exist and not be null.

    Raises:
        ValueError: it is missing or null.
    """
    if name not in row:
        raise ValueError(f"field '{name}' is missing; the row has {', '.join(row) or 'no field'}")
    found = row[name]
    if found is None:
        raise ValueError(f"field '{name}' is null")
    return found


def text(row: Mapping[str, Any], name: str) -> str:
    """Return the text of field `name`, without surrounding blanks; empty text is refused."""
    return _checked_text(value(row, name), f"field '{name}'")


def label(found: str) -> str:
    """Return an option's label, without surrounding whitespace and invisible characters."""
    return found.strip().strip(INVISIBLE).strip()


def texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the list of texts in field `name`, at least two of them.

    Raises:
        ValueError: it is missing, no list, or has too few or too many texts.
    """
    found = value(row, name)
    if isinstance(found, str | bytes) or not isinstance(found, Sequence):
        raise ValueError(f"field '{name}' must be a list, not {type(found).__name__}")
    if len(found) < 2:
        raise ValueError(f"field '{name}' has {len(found)} options, at least 2 are needed")
    if len(found) > len(LETTERS):
        raise ValueError(f"field '{name}' has {len(found)} options, at most {len(LETTERS)} fit")
    return tuple(_checked_text(entry, f"field '{name}[{i}]'") for i, entry in enumerate(found))


def number(row: Mapping[str, Any], name: str, first: int, last: int) -> int:
    """Return the integer in field `name` (a number or its digits), from `first` to `last`.

    Raises:
        ValueError: it is missing, no whole number, or out of range.
    """
    found = value(row, name)
    digits = label(found) if isinstance(found, str) else found
    if isinstance(digits, str) and digits.isascii() and digits.isdigit():
        digits = int(digits)
    if type(digits) is not int or not first <= digits <= last:
        raise ValueError(f"{name} {found!r} is not one of {first}..{last}")
    return digits


def row_id(row: Mapping[str, Any], task: str, index: int) -> str:
    """Return the row's `id`, or one composed of task and row index.

    Raises:
        ValueError: it is there and no text.
    """
    found = row.get("id")
    if found is None or found == "":
        return f"{task}-{index}"
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise ValueError(f"field 'id' must be text, not {type(found).__name__}")
    return label(str(found)) or f"{task}-{index}"


def choices(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return the options of a field `choices` = {text, label}, and the index of that in
    `answerKey`.

    Raises:
        ValueError: it is missing or inconsistent, or the answer is not among its labels.
    """
    found = value(row, "choices")
    if not isinstance(found, Mapping):
        raise ValueError(f"field 'choices' must be an object, not {type(found).__name__}")
    try:
        options, labels = texts(found, "text"), tuple(map(label, texts(found, "label")))
    except ValueError as error:
        raise ValueError(f"in 'choices': {error}") from None
    if len(options) != len(labels):
        raise ValueError(f"'choices' has {len(options)} texts but {len(labels)} labels")
    if not all(labels):
        raise ValueError("'choices' has an empty label")
    if len(set(labels)) < len(labels):
        raise ValueError(f"'choices' repeats a label: {', '.join(labels)}")
    key = label(text(row, "answerKey"))
    if key not in labels:
        raise ValueError(f"answerKey '{key}' is not among the labels {', '.join(labels)}")
    return options, labels.index(key)


def letters(options: Sequence[str]) -> tuple[str, ...]:
    """Return one letter per option."""
    return tuple(LETTERS[: len(options)])


def _checked_text(found: Any, where: str) -> str:
    if not isinstance(found, str):
        raise ValueError(f"{where} must be text, not {type(found).__name__}")
    stripped = found.strip()
    if not stripped:
        raise ValueError(f"{where} is empty")
    return stripped
