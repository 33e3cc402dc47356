"""Checks that an adapter was trained on the base model it is loaded onto."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.errors import UserError, shown
from mixlora_exp.models.base_identity import BaseIdentity, base_of, read_base, same_weights

__all__ = ["check_base", "check_same_base", "named_portably", "refusal", "shapes_differ"]

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")


def named_portably(settings: Mapping[str, Any], base: BaseIdentity | None) -> dict[str, str | None]:
    """Return the fields of `adapter_config.json` that name the base model, without paths of this
    machine: the hub's id and commit, or the name of a package or folder; of random weights nothing.

    `base`: None if it was not loaded here; then only the path in `settings` is shortened."""
    if base is None:
        name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
        return {"base_model_name_or_path": _shortened(name), "revision": revision}
    name = None if base.source == "random" else base.id
    return {"base_model_name_or_path": name, "revision": base.revision}


def _shortened(name: str | None) -> str | None:
    """Return the last part of a path; a name on the hub has one slash and remains."""
    parts = re.split(r"[/\\]", name or "")
    local = len(parts) > 2 or parts[0] in ("", ".", "..", "~") or parts[0].endswith(":")
    return next((part for part in reversed(parts) if part), None) if local else name


def refusal(folder: Path, then: BaseIdentity, now: BaseIdentity) -> UserError:
    """Return the error for an adapter whose base model `then` differs from the chosen one `now`."""
    way = f"model={then.model}" if then.source != "path" else "model.path=DIR"
    if then.seed is not None:
        way += f" seed={then.seed}"
    differ = "their weights differ"
    if str(then) == str(now):
        differ += ", by their shape or since their files were changed"
    message = f"adapter={folder} was trained on {then}, not on {now}"
    if shapes_differ(then, now):
        return UserError(f"{message}, whose layers have other sizes: give that model ({way})")
    return UserError(
        f"{message}: {differ}; give that model ({way}), or base=accept to use this one nevertheless"
    )


def shapes_differ(one: BaseIdentity, other: BaseIdentity) -> bool:
    """Return whether two models of conf/model are known to have layers of other sizes. Of folders
    nothing is known."""
    paths = [CONF_DIR / "model" / f"{base.model}.json" for base in (one, other)]
    # A name may come from a file: it is compared with those that are there, and not followed.
    known = set((CONF_DIR / "model").glob("*.json"))
    if "path" in (one.source, other.source) or not known.issuperset(paths):
        return False
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return any(first.get(name) != second.get(name) for name in SIZES)


def check_base(
    base: PreTrainedModel, folder: Path, settings: Mapping[str, Any], accept: bool = False
) -> None:
    """Compare the base weights of the adapter in `folder` with those of `base`.

    Names and locations are not compared: mirrors and copies have the same weights. If the adapter's
    base model is unknown, a warning is printed, and only shapes are checked on loading.

    Raises:
        UserError: the weights differ, and `accept` is not set.
    """
    named = settings.get("base_model_name_or_path")
    check_same_base(folder, base_of(base), accept=accept, named=named)


def check_same_base(
    folder: Path, now: BaseIdentity | None, *, accept: bool = False, named: str | None = None
) -> None:
    """Check the base model of an adapter as `check_base` does, before it is loaded. now: its
    identity, None if unknown; named: its name in the adapter's configuration.

    Raises:
        UserError: the weights differ, and `accept` is not set.
    """
    then = read_base(folder)
    same = same_weights(then, now)
    if same:
        return
    if same is False:
        if accept:
            return
        raise refusal(folder, then, now)
    hint = f" (it names {shown(named, 200)})" if named else ""
    sys.stderr.write(
        f"warning: adapter={folder}: whether it was trained on this base model is not known{hint}: "
        "it is judged by shapes alone\n"
    )
