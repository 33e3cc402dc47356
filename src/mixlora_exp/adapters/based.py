"""Whether an adapter was trained on the base model that it is put on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mixlora_exp.errors import UserError, shown
from mixlora_exp.models.base_identity import BaseIdentity, base_of, read_base, same_weights

__all__ = ["check_base", "check_same_base", "refusal"]


def refusal(folder: Path, then: BaseIdentity, now: BaseIdentity) -> UserError:
    """Of an adapter that was trained on other weights than those of now."""
    way = f"model={then.model}" if then.source != "path" else "model.path=DIR"
    if then.seed is not None:
        way += f" seed={then.seed}"
    differ = "their weights differ"
    if str(then) == str(now):
        differ += ", by their shape or since their files were changed"
    return UserError(
        f"adapter={folder} was trained on {then}, not on {now}: {differ}; give that model ({way}), "
        "or base=accept to use this one all the same"
    )


def check_base(
    base: PreTrainedModel, folder: Path, settings: Mapping[str, Any], accept: bool = False
) -> None:
    """Compare the weights that the adapter in `folder` was trained on with those of `base`.

    Names and places say nothing: a mirror or another folder has the same weights. An adapter of
    which nothing is noted is judged by its shapes when it is loaded, and that is told on standard
    error.

    Raises:
        UserError: the weights are others, and `accept` is not set.
    """
    named = settings.get("base_model_name_or_path")
    check_same_base(folder, base_of(base), accept=accept, named=named)


def check_same_base(
    folder: Path, now: BaseIdentity | None, *, accept: bool = False, named: str | None = None
) -> None:
    """The same of a base model that is not loaded; `named`: what the adapter's own configuration
    calls its base.

    Raises:
        UserError: the weights are others, and `accept` is not set.
    """
    then = read_base(folder)
    same = same_weights(then, now)
    if same:
        return
    if same is False:
        if accept:
            return
        raise refusal(folder, then, now)
    told = f" (it names {shown(named, 200)})" if named else ""
    sys.stderr.write(
        f"warning: adapter={folder}: whether it was trained on this base model is not known{told}: "
        "it is judged by shapes alone\n"
    )
