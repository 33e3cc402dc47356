"""`name=value` arguments of a script, checked against a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mixlora_exp.errors import UserError

__all__ = ["options"]

Schema = TypeVar("Schema")


def options(schema: type[Schema], arguments: Sequence[str]) -> Schema:
    """An instance of the dataclass `schema` with the values given as `name=value`.

    A field of text takes the value as it is, whatever characters it has; `null` is none.

    Raises:
        UserError: a field is unknown or a value is not of its type.
    """
    known = ", ".join(schema.__dataclass_fields__)
    if any(word in ("-h", "--help") for word in arguments):
        sys.stdout.write(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\nFields: {known}\n")
        raise SystemExit(0)
    for word in arguments:
        if "=" not in word:
            raise UserError(f"{word!r} is not name=value; the fields are {known}")
    fields = schema.__dataclass_fields__
    for word in arguments:
        name = word.partition("=")[0]
        if name.partition(".")[0] not in fields:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{word!r}: there is no field {name}; {hint}The fields are {known}")
    texts, others = {}, []
    for word in arguments:
        name, _, value = word.partition("=")
        optional = name in fields and fields[name].type == "str | None"
        if optional or (name in fields and fields[name].type == "str"):
            texts[name] = None if optional and value == "null" else value
        else:
            others.append(word)
    try:
        given = OmegaConf.from_dotlist(others)
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
        return dataclasses.replace(made, **texts)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{str(error).splitlines()[0]}; the fields are {known}") from error
