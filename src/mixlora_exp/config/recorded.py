"""Configurations read from records: untrusted data, read by the types of the schema.

Records may come from other people and other versions. Nothing in one is composed, resolved or
instantiated: each value is a plain value of its field's type, or the record is refused.
"""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from mixlora_exp.config.architecture import current_model
from mixlora_exp.config.checks import require_name
from mixlora_exp.config.later_fields import completed
from mixlora_exp.config.schema import (
    Config,
    MethodConfig,
    ModelConfig,
)
from mixlora_exp.config.schema_mixture import method_class
from mixlora_exp.errors import UserError, shown

LONGEST = 4096
"""Maximum number of characters of a text; no path, name or address needs more."""
LARGEST = 1e300
"""Maximum magnitude of an integer in a field of real numbers."""
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
Recorded = Mapping[str, Any] | None
"""Groups or fields from a record, which replace what a command line does not give."""
Made = Callable[[type, dict[str, Any]], Any]
"""From a class of the schema and the values of its fields to what stands for it."""


def check_recorded(config: Any) -> None:
    """Check a record's configuration, or some of its groups, against the schema. Fields may be
    missing, since older versions lack them, and ranges are not checked.

    Raises:
        UserError: a field is unknown to the schema, a value has the wrong type, or a name is not
            valid.
    """
    if not isinstance(config, dict):
        raise UserError(f"config must be an object, not {shown(repr(config), 60)}")
    _read(config, Config, "config", lambda _, values: values)


def rebuilt(settings: Mapping[str, Any]) -> Config:
    """Return the configuration of a record. Fields that its version lacked have the values that
    keep its behaviour.

    Raises:
        UserError: a field is unknown to the schema, or a value has the wrong type or is out of its
            range.
    """
    return built(completed(settings), Config)


def built(settings: Mapping[str, Any], kind: type) -> Any:
    """Return an instance of the schema `kind` with these plain values; see `rebuilt`."""
    return _read(settings, kind, "config", lambda owner, values: owner(**values))


def overlaid(
    composed: Mapping[str, Any], recorded: Mapping[str, Any], given: Iterable[str]
) -> dict[str, Any]:
    """Return a composed configuration, as plain values, with the values of `recorded`, some groups
    or fields of a record's configuration, in all fields but those that the command line gave.

    given: their dotted names; a group's name stands for all of its fields.
    """
    tree = dict(composed)
    for name, value in copy.deepcopy(dict(recorded)).items():
        value = current_model(value) if name == "model" else value
        tree[name] = {**composed[name], **value} if isinstance(value, dict) else value
    for dotted in given:
        _restore(tree, composed, dotted.split("."))
    return tree


def _restore(tree: dict[str, Any], composed: Mapping[str, Any], path: list[str]) -> None:
    name, *rest = path
    if rest and isinstance(tree.get(name), dict) and isinstance(composed.get(name), dict):
        _restore(tree[name], composed[name], rest)
    elif name in composed:
        tree[name] = composed[name]


@cache
def _types(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _read_fields(value: Mapping[str, Any], owner: type, where: str, made: Made) -> Any:
    if owner is ModelConfig:
        value = current_model(value)
    known = {item.name for item in fields(owner)}
    unknown = [shown(str(name), 60) for name in value if name not in known]
    if unknown:
        raise UserError(
            f"{where} has fields that this version does not know ({', '.join(unknown[:5])}): a "
            "later version wrote it, or it was edited by hand; use the version that wrote it"
        )
    found = {
        name: _read(content, _types(owner)[name], f"{where}.{name}", made)
        for name, content in value.items()
    }
    if isinstance(value.get("name"), str):
        require_name(f"{where}.name", value["name"])
    if not issubclass(owner, Config) and "custom" in known:
        _check_tasks(value, where)
    return made(owner, found)


def _check_tasks(value: Mapping[str, Any], where: str) -> None:
    for part in ("train", "evaluate", "custom"):
        for task in value.get(part) or ():
            require_name(f"{where}.{part}", task)


def _read(value: Any, kind: Any, where: str, made: Made) -> Any:
    """Return the value of a field, in the type `kind`; `made` makes the instances of the schema."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kind = next(one for one in arguments if one is not type(None))
        return _read(value, kind, where, made)
    if origin is list:
        _require(isinstance(value, list), where, value, "a list")
        # The entries of `adapters` are not checked here: each has its own record.
        return [
            entry if arguments[0] is Any else _read(entry, arguments[0], where, made)
            for entry in value
        ]
    if origin is dict:
        _require(isinstance(value, dict), where, value, "an object")
        for key in value:
            require_name(where, key)
        return {
            key: _read(entry, arguments[1], f"{where}.{key}", made) for key, entry in value.items()
        }
    if is_dataclass(kind):
        _require(isinstance(value, dict), where, value, "an object")
        owner = method_class(value) if kind is MethodConfig else kind
        return _read_fields(value, owner, where, made)
    if kind is Any:
        _check_plain(value, where)
        return value
    if issubclass(kind, Enum):
        known = [entry.value for entry in kind]
        _require(isinstance(value, str) and value in known, where, value, " or ".join(known))
        return kind(value)
    if kind is float:
        small = type(value) is int and abs(value) <= LARGEST
        _require(small or type(value) is float, where, value, KINDS[kind])
        return float(value)
    _require(type(value) is kind, where, value, KINDS[kind])
    if kind is str:
        _require(len(value) <= LONGEST, where, value, f"at most {LONGEST} characters")
    return value


def _check_plain(value: Any, where: str) -> None:
    """Check a field of a model's `config.json`: null, a scalar, or lists and objects of them."""
    if isinstance(value, list):
        for entry in value:
            _check_plain(entry, where)
    elif isinstance(value, dict):
        for key, entry in value.items():
            require_name(where, key)
            _check_plain(entry, f"{where}.{key}")
    elif value is not None:
        _require(type(value) in KINDS, where, value, "a plain value")
        if isinstance(value, str):
            _require(len(value) <= LONGEST, where, value, f"at most {LONGEST} characters")


def _require(condition: bool, where: str, value: Any, rule: str) -> None:
    if not condition:
        raise UserError(f"{where}={shown(repr(value), 80)} is not valid: it must be {rule}")
