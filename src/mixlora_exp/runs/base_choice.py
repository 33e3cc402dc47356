"""Finds the base model of an adapter that is given without one, from the files next to the adapter.

The contents of these files are only compared with the models in conf/model: paths in them are not
opened, and names in them are not looked up on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.recorded import Recorded
from mixlora_exp.errors import UserError, shown
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run

if TYPE_CHECKING:
    from mixlora_exp.models import BaseIdentity

CACHED = re.compile(r"(.+)-[0-9a-f]{12}")
"""Name of a folder with a package's converted weights: model name and hash."""
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)")
"""Name of a folder in the hub's cache: owner and model name."""


@dataclass(frozen=True, slots=True)
class Known:
    """A model in conf/model; `option` is the name of its file."""

    option: str
    source: str
    hub_id: str | None
    package: str | None


def _known() -> Iterator[Known]:
    for path in sorted((CONF_DIR / "model").glob("*.yaml")):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        hub_id, package = found.get("hub_id"), found.get("package")
        yield Known(path.stem, found.get("source", "hub"), hub_id, package)


def matched(name: str) -> str | None:
    """Return the option of conf/model that an adapter's `base_model_name_or_path` refers to, or
    None.

    Recognises a hub repository (case-insensitive), a package of weights (with or without version),
    and paths into the hub's cache or the cache of converted weights.
    """
    parts = [part for part in re.split(r"[/\\]", name.strip()) if part]
    plain = "/".join(parts).lower()
    for known in _known():
        hub = (known.hub_id or "").lower()
        if known.source == "hub" and hub:
            cached = [SNAPSHOT.fullmatch(part) for part in parts]
            names = {plain, *(f"{c[1]}/{c[2]}".lower() for c in cached if c)}
            if hub in names:
                return known.option
        if known.source == "pypi":
            package = (known.package or "").lower()
            converted = CACHED.fullmatch(parts[-1]) if parts else None
            if plain in (package, package.partition("==")[0]) or (
                converted is not None and converted[1] == known.option
            ):
                return known.option
    return None


def noted_base(folder: Path) -> BaseIdentity | None:
    """Return the identity of the base model that the adapter in `folder` was trained on: the one
    saved with it, or that in the record of its run; None if there is neither."""
    from mixlora_exp.models import of_record, read_base

    base, path = read_base(folder), folder.parent / RECORD
    return of_record(read_run(path)) if base is None and path.exists() else base


def base_of(
    folder: Path, given: Collection[str], *, precision: bool = False
) -> tuple[list[str], Recorded]:
    """Return the base model of the adapter in `folder`: the override of its file in conf/model,
    and fields that stand beside the adapter (see `resolve.to_config`): of a record, or whether the
    weights are random, with their seed. `given`: names on the command line.

    The sources, in order: the record of the run that trained the adapter (with `precision`, also
    its precision), the base model's identity saved with the adapter, and the model name in the
    adapter's configuration.

    Raises:
        UserError: the base model is unknown, or is not a model in conf/model.
    """
    if "model" in given or "model.name" in given:
        return [], {}
    if (folder.parent / RECORD).exists():
        trained = read_run(folder.parent / RECORD)["config"]
        kept = {name: trained[name] for name in ("model", "seed")}
        if precision:
            kept["trainer"] = {"precision": trained["trainer"]["precision"]}
        return [], kept
    return _by_name(folder, given)


def _by_name(folder: Path, given: Collection[str]) -> tuple[list[str], Recorded]:
    """Return `base_of` for an adapter without a record."""
    # Imported late: PEFT takes a second to load.
    from mixlora_exp.adapters.saved import saved_settings
    from mixlora_exp.models import read_base

    settings, noted = saved_settings(folder), read_base(folder)
    if "experiment" in given:
        return [], {}  # The experiment chooses the model.
    if noted is not None and noted.source != "path":
        known = next((known for known in _known() if known.option == noted.model), None)
        if known is not None:
            drawn: dict[str, Any] = {}
            if noted.source == "random":
                drawn = {"model": {"weights": "random"}} if known.source != "random" else {}
                drawn |= {} if noted.seed is None else {"seed": noted.seed}
            return [f"model={known.option}"], drawn
    name = settings.get("base_model_name_or_path")
    option = matched(name) if name else None
    if option is not None:
        return [f"model={option}"], {}
    if {"model.path", "model.hub_id"} & set(given):
        return [], {}
    if noted is not None:
        reason = f"was trained on {noted}, which is not a model in conf/model"
    elif name:
        reason = f"was trained on {shown(name, 120)}, which is not a model in conf/model"
    else:
        reason = "does not name its base model"
    raise UserError(
        f"adapter={folder} {reason}: add model=NAME, or model.path=DIR or model.hub_id=ID with "
        "that model"
    )
