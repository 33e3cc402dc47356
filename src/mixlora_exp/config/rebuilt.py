"""The `Config` of a record, built from plain values of which nothing is composed or resolved."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from mixlora_exp.config.architecture import current_model
from mixlora_exp.config.resolve import LATER
from mixlora_exp.config.schema import Config, MethodConfig, ModelConfig
from mixlora_exp.config.schema_mixture import method_class

EARLIEST = {"preset": {"name": "correct"}}
"""Groups that the first records lack."""


def rebuilt(settings: Mapping[str, Any]) -> Config:
    """The configuration of a record that passed `check_recorded`. Fields that its version lacked
    have the values that keep its behaviour.

    Raises:
        UserError: a value is out of its range.
    """
    tree = {**EARLIEST, **settings, "model": current_model(settings["model"])}
    for (group, name), value in LATER.items():
        owner = method_class(tree["method"]) if group == "method" else None
        if owner is None or name in {item.name for item in fields(owner)}:
            tree[group] = {name: value, **tree[group]}
    return _built(tree, Config)


def _built(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if value is None or kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _built(value, next(one for one in arguments if one is not type(None)))
    if origin is list:
        return [_built(entry, arguments[0]) for entry in value]
    if origin is dict:
        return {key: _built(entry, arguments[1]) for key, entry in value.items()}
    if is_dataclass(kind):
        owner = method_class(value) if kind is MethodConfig else kind
        value = current_model(value) if owner is ModelConfig else value
        hints = typing.get_type_hints(owner)
        return owner(**{name: _built(entry, hints[name]) for name, entry in value.items()})
    if issubclass(kind, Enum):
        return kind(value)
    return float(value) if kind is float else value
