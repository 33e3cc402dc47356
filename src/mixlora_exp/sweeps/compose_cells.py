"""Composes the cells of a sweep for display, reusing what configuration groups share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mixlora_exp.config.command import compose_cell
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError

FIELDS = tuple(Config.__dataclass_fields__)


class ByGroup:
    """Composes each choice of a group once, with the other groups as in the first cell, and puts
    the cells together from them: Hydra takes a tenth of a second for each composition, and the
    tables have hundreds of cells. A choice that changes anything beside its own group is not
    separable, and its cells are composed whole."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, ...], tuple[dict[str, list[str]], Config]] = {}
        self._alone: dict[tuple[Any, ...], Any] = {}

    def __call__(self, hydra: Any, name: str, overrides: Sequence[str]) -> Config:
        """Compose a cell of the sweep as `compose_cell` does.

        Raises:
            UserError: there is a mistake in the overrides.
        """
        parts: dict[str, list[str]] = {}
        for line in overrides:
            head = line.partition("=")[0].partition(".")[0]
            parts.setdefault(head if head in FIELDS else "", []).append(line)
        key = (name, *parts.get("", ()), *parts)
        if key not in self._first:
            self._first[key] = parts, compose_cell(hydra, name, overrides)
        first, config = self._first[key]
        changes = {}
        for head, lines in parts.items():
            if lines != first[head]:
                found = self._changed(hydra, key, head, lines)
                if found is None:
                    return compose_cell(hydra, name, overrides)
                changes[head] = found
        return dataclasses.replace(config, **changes)

    def _changed(self, hydra: Any, key: tuple[str, ...], head: str, lines: list[str]) -> Any:
        """The value of field `head` under these overrides; None if it cannot be composed apart."""
        choice = (key, head, *lines)
        if choice not in self._alone:
            first, config = self._first[key]
            words = [line for part in {**first, head: lines}.values() for line in part]
            try:
                found = compose_cell(hydra, key[0], words)
            except UserError:
                found = None  # Perhaps not with the others' first choices.
            same = found is not None and all(
                getattr(found, name) == getattr(config, name) for name in FIELDS if name != head
            )
            self._alone[choice] = getattr(found, head) if same else None
        return self._alone[choice]
