"""Composes the cells of sweeps for display, reusing what configuration groups share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mixlora_exp.config.command import compose_cell, load, parse_overrides
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError

FIELDS = tuple(Config.__dataclass_fields__)
PARTS = (*FIELDS, "scale")
"""Fields and groups that a cell is put together from. `scale` sets fields of several groups."""
INTERPOLATED = re.compile(r"\$\{\.*(\w+)")
"""The group of `${preset.order}`, the field of `${.num_experts}`."""


class ByGroup:
    """Composes each choice of a group once, with all else as in the first cell, and puts the cells
    of all sweeps together from them: Hydra takes a tenth of a second for each composition, and the
    tables have hundreds of cells. A number is set in the composed group. Cells are composed whole
    where choices change the same field, or a field that others take their values from."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, ...], tuple[dict[str, list[str]], Config]] = {}
        self._alone: dict[tuple[Any, ...], dict[str, Any] | None] = {}
        self._sweeps: dict[tuple[str, ...], DictConfig] = {}

    def sweep(self, hydra: Any, name: str, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        """Compose as `load` does, but only the part that describes the sweep."""
        words = [line for line in overrides if _part(line) not in PARTS]
        known = [line for line in words if not _only_sweeps(line)]
        if (name, *known) not in self._sweeps:
            whole = load(hydra, name, known, mode).hydra
            sweep = {key: whole[key] for key in ("mode", "launcher", "sweeper")}
            self._sweeps[name, *known] = OmegaConf.create({"hydra": sweep})
        files = [OmegaConf.load(_experiment(line)) for line in words if line not in known]
        return OmegaConf.merge(self._sweeps[name, *known], *files)

    def cell(self, hydra: Any, name: str, overrides: Sequence[str]) -> Config:
        """Compose one cell as `compose_cell` does.

        Raises:
            UserError: there is a mistake in the overrides.
        """
        try:
            found = self._put_together(hydra, name, overrides)
        except UserError:
            found = None  # It may be valid as a whole, or else has the usual message.
        return compose_cell(hydra, name, overrides) if found is None else found

    def _put_together(self, hydra: Any, name: str, overrides: Sequence[str]) -> Config | None:
        parts: dict[str, list[str]] = {}
        numbers = []
        for line in overrides:
            if _number(line) is not None:
                numbers.append(line)
            elif not _only_sweeps(line):
                part = _part(line)
                parts.setdefault(part if part in PARTS else "", []).append(line)
        key = (name, *parts.pop("", ()))
        if key not in self._first:
            self._first[key] = parts, compose_cell(hydra, name, [*key[1:], *_lines(parts)])
        first, config = self._first[key]
        changes: dict[str, Any] = {}
        for part in dict.fromkeys([*first, *parts]):
            lines = parts.get(part, [])
            if lines != first.get(part, []):
                found = self._changed(hydra, key, part, lines)
                if found is None or found.keys() & changes.keys():
                    return None
                changes |= found
        for line in numbers:
            part, field = line.partition("=")[0].split(".")
            owner = changes.get(part, getattr(config, part))
            if not dataclasses.is_dataclass(owner) or {part, field} & _read_by_others():
                return None
            value, old = _number(line), getattr(owner, field, None)
            if type(old) is float:
                value = float(value)
            if type(old) is not type(value):
                return None
            changes[part] = dataclasses.replace(owner, **{field: value})
        return dataclasses.replace(config, **changes)

    def _changed(
        self, hydra: Any, key: tuple[str, ...], part: str, lines: list[str]
    ) -> dict[str, Any] | None:
        """Return the fields that change if `part` is chosen by these overrides; None if it cannot
        be composed apart."""
        if part in _read_by_others():
            return None
        choice = (key, part, *lines)
        if choice not in self._alone:
            first, config = self._first[key]
            words = [*key[1:], *_lines({**first, part: lines})]
            try:
                found = compose_cell(hydra, key[0], words)
            except UserError:
                self._alone[choice] = None  # Perhaps not with the others' first choices.
            else:
                pairs = ((f, getattr(found, f), getattr(config, f)) for f in FIELDS)
                self._alone[choice] = {name: new for name, new, old in pairs if new != old}
        return self._alone[choice]


def _lines(parts: dict[str, list[str]]) -> list[str]:
    return [line for lines in parts.values() for line in lines]


def _part(line: str) -> str:
    return line.partition("=")[0].partition(".")[0]


@cache
def _number(line: str) -> int | float | None:
    """Return the value of `group.field=NUMBER`; None for another override."""
    if not re.match(r"\w+\.\w+=", line) or _part(line) not in FIELDS:
        return None
    value = parse_overrides([line])[0].value()
    return value if type(value) in (int, float) else None


@cache
def _read_by_others() -> set[str]:
    """Return names of groups, and of fields of the same group, from which files take values."""
    texts = (path.read_text(encoding="utf-8") for path in CONF_DIR.rglob("*.yaml"))
    return {name for text in texts for name in INTERPOLATED.findall(text)}


@cache
def _only_sweeps(line: str) -> bool:
    """Return whether an override chooses an experiment whose file describes a sweep and sets no
    field."""
    if not line.startswith("experiment=") or not _experiment(line).is_file():
        return False
    return set(OmegaConf.load(_experiment(line))) == {"hydra"}


def _experiment(line: str) -> Path:
    return CONF_DIR / "experiment" / f"{line.partition('=')[2]}.yaml"
