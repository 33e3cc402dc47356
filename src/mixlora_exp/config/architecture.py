"""The transformers configuration of a named model: the JSON file next to its YAML file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixlora_exp.config.schema_model import ModelConfig
from mixlora_exp.errors import UserError

OLD_NAMES = {
    "family": "model_type", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings", "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings",
    "layers": "num_hidden_layers",
}  # fmt: skip
"""Fields of the group `model` in records written before it had a `config.json` -> their names in
transformers. `layers`, unless null, overrode `num_layers`."""

OWN = "own"
"""Option of the group `model` for one of the user's own, whose `config.json` gives the shape."""
WHOLE = {"model_type", "hidden_size", "num_hidden_layers"}


def current_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group `model` of a record, converted to the current schema."""
    if "family" not in model:
        return dict(model)
    kept = {name: value for name, value in model.items() if name not in OLD_NAMES}
    given = {name: model[name] for name in OLD_NAMES if name in model}
    if given.get("layers") is None:
        given.pop("layers", None)
    return {**kept, "config": {OLD_NAMES[name]: value for name, value in given.items()}}


def old_name(name: str) -> str | None:
    """Return the current way to set a former field of the group `model`; None for any other
    name."""
    new = OLD_NAMES.get(name)
    return None if new is None else f"model.config={{{new}: VALUE}}"


def read_architecture(folders: Iterable[Path], name: str) -> dict[str, Any] | None:
    """Return `model/<name>.json` from the first of the configuration `folders` that has it, or
    None.

    Raises:
        UserError: the file cannot be read as a JSON object.
    """
    for folder in folders:
        path = folder / "model" / f"{name}.json"
        if not path.is_file():
            continue
        try:
            # Trusted like the YAML next to it: the file is in the user's configuration folder.
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): put the model's config.json there"
            ) from error
        if not isinstance(found, dict):
            raise UserError(f"{path} is not a JSON object: put the model's config.json there")
        # Fields with an underscore are internal to transformers.
        return {name: value for name, value in found.items() if not name.startswith("_")}
    return None


def complete(model: ModelConfig, published: Mapping[str, Any] | None) -> ModelConfig:
    """Return `model` with a complete `config`: the `published` JSON, overridden by the given
    fields.

    A given `config` that has all fields of `WHOLE`, as in a record, replaces the published one.

    Raises:
        UserError: there is no configuration, or a field is overridden although the weights are
            loaded, not drawn at random.
    """
    given, whole = model.config, set(model.config) >= WHOLE
    if model.name == OWN:
        model = _named(model)
        if model.path is None and not given and not model.draws_weights:
            return model  # `models.own_shape` reads it from the hub.
    if published is None and not whole and (model.draws_weights or model.path is None):
        raise UserError(
            f"model={model.name} has no configuration: put its config.json next to the YAML as "
            f"model/{model.name}.json, or give a folder with the model as model.path=DIR"
        )
    known = published or {}
    changed = [name for name, value in given.items() if name not in known or known[name] != value]
    fixed = [] if model.draws_weights else changed
    if whole and (model.path is not None or published is None):
        fixed = []  # Checked against the model's files when they are loaded.
    elif model.path is None:
        # A model can be used with fewer positions than it has.
        fixed = [name for name in fixed if name != "max_position_embeddings"]
    if fixed:
        name = fixed[0]
        raise UserError(
            f"model.config={{{name}: {given[name]}}} is not valid: pretrained weights need the "
            "configuration they were trained with; add model.weights=random to draw random ones"
        )
    # The paper's denominator applies only to the published configuration.
    nominal = None if changed else model.nominal_parameters
    config = dict(given) if whole else {**known, **given}
    return dataclasses.replace(model, config=config, nominal_parameters=nominal)


def _named(model: ModelConfig) -> ModelConfig:
    """Return a model of the user's own with the last part of its folder or repository as its
    name."""
    place = model.path or model.hub_id
    if not place:
        raise UserError(f"model={OWN} is not enough: add model.path=DIR or model.hub_id=ID")
    last = [part for part in re.split(r"[/\\]", place) if part not in ("", ".", "..")][-1:]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", "".join(last)).lstrip("_.-")
    return dataclasses.replace(model, name=name or OWN)
