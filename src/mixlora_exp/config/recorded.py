"""Configurations read from records: untrusted data, checked against the types of the schema.

Records may come from other people and other versions. Nothing in one is composed, resolved or
instantiated: each value is a plain value of its field's type, or the record is refused.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from mixlora_exp.config.architecture import current_model
from mixlora_exp.config.checks import require_name
from mixlora_exp.config.schema import (
    Config,
    MethodConfig,
    ModelConfig,
)
from mixlora_exp.config.schema_mixture import method_class
from mixlora_exp.config.typed import literal
from mixlora_exp.errors import UserError, shown

LONGEST = 4096
"""Maximum number of characters of a text; no path, name or address needs more."""
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def check_recorded(config: Any) -> None:
    """Check a record's configuration, or some of its groups, against the schema. Fields may be
    missing, since older versions lack them.

    Raises:
        UserError: a field is unknown to the schema, a value has the wrong type, or a name is not
            valid.
    """
    if not isinstance(config, dict):
        raise UserError(f"config must be an object, not {shown(repr(config), 60)}")
    _check_fields(config, Config, "config")


@cache
def _types(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _check_fields(value: Mapping[str, Any], owner: type, where: str) -> None:
    if owner is ModelConfig:
        value = current_model(value)
    known = {item.name for item in fields(owner)}
    unknown = [shown(str(name), 60) for name in value if name not in known]
    if unknown:
        raise UserError(
            f"{where} has fields that this version does not know ({', '.join(unknown[:5])}): a "
            "later version wrote it, or it was edited by hand; use the version that wrote it"
        )
    for name, content in value.items():
        _check(content, _types(owner)[name], f"{where}.{name}")
    if isinstance(value.get("name"), str):
        require_name(f"{where}.name", value["name"])
    if owner is not Config and "custom" in known:
        _check_tasks(value, where)


def _check_tasks(value: Mapping[str, Any], where: str) -> None:
    for part in ("train", "evaluate", "custom"):
        for task in value.get(part) or ():
            require_name(f"{where}.{part}", task)


def _check(value: Any, kind: Any, where: str) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return
        _check(value, next(one for one in arguments if one is not type(None)), where)
    elif origin is list:
        _require(isinstance(value, list), where, value, "a list")
        # The entries of `adapters` are not checked here: each has its own record.
        for entry in value if arguments[0] is not Any else ():
            _check(entry, arguments[0], where)
    elif origin is dict:
        _require(isinstance(value, dict), where, value, "an object")
        for key, entry in value.items():
            # Keys are names of tasks or fields; Hydra would resolve anything else in a key.
            require_name(where, key)
            _check(entry, arguments[1], f"{where}.{key}")
    elif is_dataclass(kind):
        _require(isinstance(value, dict), where, value, "an object")
        owner = method_class(value) if kind is MethodConfig else kind
        _check_fields(value, owner, where)
    elif kind is Any:
        _check_plain(value, where)
    elif issubclass(kind, Enum):
        known = [entry.value for entry in kind]
        _require(isinstance(value, str) and value in known, where, value, " or ".join(known))
    elif kind is float:
        _require(type(value) in (int, float), where, value, KINDS[kind])
    else:
        _require(type(value) is kind, where, value, KINDS[kind])
        if kind is str:
            _require(len(value) <= LONGEST, where, value, f"at most {LONGEST} characters")


def _check_plain(value: Any, where: str) -> None:
    """Check a field of a model's `config.json`: null, a scalar, or lists and objects of them."""
    if isinstance(value, list):
        for entry in value:
            _check_plain(entry, where)
    elif isinstance(value, dict):
        _check(value, dict[str, Any], where)
    elif value is not None:
        _require(type(value) in KINDS, where, value, "a plain value")
        _check(value, type(value), where)


def _require(condition: bool, where: str, value: Any, rule: str) -> None:
    if not condition:
        raise UserError(f"{where}={shown(repr(value), 80)} is not valid: it must be {rule}")


# The adapter determines the method, training settings have no effect, and a record must not decide
# where files are written.
NOT_TAKEN = ("method", "adapter", "adapters", "base", "dry_run", "force", "tracker", "output_dir")


def recorded(config: Mapping[str, Any], skipped: set[str]) -> Iterator[str]:
    """The overrides that reproduce a configuration of `read_run`, without the groups and fields in
    `skipped`: fields of the schema, each with a literal value in which nothing is resolved."""
    for name, value in config.items():
        if name in NOT_TAKEN or name in skipped:
            continue
        if name == "model":
            value = current_model(value)
        if isinstance(value, dict):
            for field, content in value.items():
                if f"{name}.{field}" in skipped:
                    continue
                if isinstance(content, dict):
                    # The schema does not list its keys: `++` adds them.
                    if content:
                        yield f"++{name}.{field}={literal(content)}"
                else:
                    yield f"{name}.{field}={literal(content)}"
        else:
            yield f"{name}={literal(value)}"
