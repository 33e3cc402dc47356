"""The base model of an adapter that is named without one: from what lies beside the adapter.

What its files say is only ever compared with the models in conf/model: a path that stands in them
is not opened, and a name not asked for on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from mixlora_exp.config import CONF_DIR
from mixlora_exp.config.recorded import recorded
from mixlora_exp.errors import UserError, shown
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run

__all__ = ["base_words", "matched"]

CACHED = re.compile(r"(.+)-[0-9a-f]{12}")
"""Name of a folder with converted weights of a package: the model's, and a hash."""
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)")
"""Name of a folder in the hub's cache: owner and model."""


@dataclass(frozen=True, slots=True)
class Known:
    """A model of conf/model, by its option there."""

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
    """The model of conf/model that an adapter's `base_model_name_or_path` means, None if none.

    A repository on the hub, whatever the case; a package of weights, with or without its version;
    or parts of a path, if they are those of a cache: of the hub's, or of converted weights.
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


def base_words(folder: Path, given: Collection[str], *, precision: bool = False) -> list[str]:
    """The overrides that choose the base model of the adapter in `folder`, and the seed that a
    random one is drawn from; of those that are not among the fields that were `given`.

    The record of the run that left the adapter tells, and its precision too if that is asked for;
    else the note on its base; else the name in its configuration.

    Raises:
        UserError: nothing tells, or what it was trained on is no model of conf/model.
    """
    if "model" in given or "model.name" in given:
        return []
    if (folder.parent / RECORD).exists():
        return _of_record(folder.parent / RECORD, given, precision)
    # Late: PEFT takes a second to load.
    from mixlora_exp.adapters.saved import saved_settings
    from mixlora_exp.models import read_base

    settings, noted = saved_settings(folder), read_base(folder)
    if "experiment" in given:
        return []  # It says which.
    if noted is not None and noted.source != "path":
        known = next((known for known in _known() if known.option == noted.model), None)
        if known is not None:
            words = [f"model={known.option}"]
            if noted.source == "random":
                if noted.seed is not None and "seed" not in given:
                    words.append(f"seed={noted.seed}")
                if known.source != "random" and "model.weights" not in given:
                    words.append("model.weights=random")
            return words
    name = settings.get("base_model_name_or_path")
    option = matched(name) if name else None
    if option is not None:
        return [f"model={option}"]
    if "model.path" in given:
        return []
    if noted is not None:
        told = f"was trained on {noted}, which is no model of conf/model"
    elif name:
        told = f"was trained on {shown(name, 120)}, which is no model of conf/model"
    else:
        told = "does not say on which model it was trained"
    raise UserError(f"adapter={folder} {told}: add model=NAME, or model.path=DIR with that model")


def _of_record(path: Path, given: Collection[str], precision: bool) -> list[str]:
    trained = read_run(path)["config"]
    kept = {"model": trained["model"], "seed": trained["seed"]}
    if precision:
        kept["trainer"] = {"precision": trained["trainer"]["precision"]}
    return list(recorded(kept, set(given)))
