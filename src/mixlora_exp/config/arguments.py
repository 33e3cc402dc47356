"""`name=value` arguments of a script, checked against a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from mixlora_exp.errors import UserError

Schema = TypeVar("Schema")
KINDS = {
    "int": "a whole number",
    "int | None": "a whole number, or null",
    "float": "a number",
    "float | None": "a number, or null",
    "bool": "true or false",
    "list[str]": "a list, [A,B]",
}
"""Type of a field -> its name in messages."""
MAY_BE_EMPTY = ("prompt",)
"""Text fields that may be empty here, because the command checks them itself."""


def options(schema: type[Schema], arguments: Sequence[str], *, also: Sequence[str] = ()) -> Schema:
    """An instance of the dataclass `schema` with the values given as `name=value`.

    A text field takes the value literally, except that `null` means None. `also` names further
    fields of the command, for messages only.

    Raises:
        UserError: a field is unknown or a value has the wrong type.
    """
    fields = schema.__dataclass_fields__
    known = ", ".join((*fields, *also))
    if any(word in ("-h", "--help") for word in arguments):
        sys.stdout.write(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\nFields: {known}\n")
        raise SystemExit(0)
    texts: dict[str, str | None] = {}
    others = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not name=value; the fields are {known}")
        if name.partition(".")[0] not in fields:
            close = difflib.get_close_matches(name, (*fields, *also), n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}? The fields are" if close else "the fields are"
            raise UserError(f"{word!r}: there is no field {name}; {hint} {known}")
        kind = fields[name].type if name in fields else None
        if kind not in ("str", "str | None"):
            _merged(schema, [word])  # One at a time, so that the message names this one.
            others.append(word)
        elif value or name in MAY_BE_EMPTY:
            texts[name] = None if kind == "str | None" and value == "null" else value
        else:
            raise UserError(f"{name}= is not valid: give a value, or leave it out")
    return dataclasses.replace(_merged(schema, others), **texts)


def _merged(schema: type[Schema], words: Sequence[str]) -> Schema:
    """An instance of `schema` with the values of `words`, checked against its types."""
    try:
        given = OmegaConf.from_dotlist(list(words))
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
        for name, field in schema.__dataclass_fields__.items():
            if field.type == "list[str]" and not all(
                isinstance(v, str) for v in getattr(made, name)
            ):
                raise ValidationError("an entry is not text")
    except (OmegaConfBaseException, YAMLError) as error:
        field = schema.__dataclass_fields__.get(" ".join(words).partition("=")[0])
        wanted = KINDS.get(str(field.type), str(field.type)) if field else "what the field takes"
        raise UserError(f"{' '.join(words)} is not valid: it must be {wanted}") from error
    return made
