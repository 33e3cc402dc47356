"""The transformers configuration of a named model: the JSON file beside its YAML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixlora_exp.config.schema_model import ModelConfig
from mixlora_exp.errors import UserError

__all__ = ["complete", "current_model", "old_name", "read_architecture"]

OLD_NAMES = {
    "family": "model_type", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings", "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings",
    "layers": "num_hidden_layers",
}  # fmt: skip
"""Fields that the group `model` had before it carried a `config.json`, in records of that time, and
their names in transformers. `layers`, unless null, cut the depth."""

WHOLE = {"model_type", "hidden_size", "num_hidden_layers"}


def current_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The group `model` of a record as it would be written today."""
    if "family" not in model:
        return dict(model)
    kept = {name: value for name, value in model.items() if name not in OLD_NAMES}
    given = {name: model[name] for name in OLD_NAMES if name in model}
    if given.get("layers") is None:
        given.pop("layers", None)
    return {**kept, "config": {OLD_NAMES[name]: value for name, value in given.items()}}


def old_name(name: str) -> str | None:
    """How a field that the group `model` had before is given today; None for any other."""
    new = OLD_NAMES.get(name)
    return None if new is None else f"model.config={{{new}: VALUE}}"


def read_architecture(folders: Iterable[Path], name: str) -> dict[str, Any] | None:
    """`model/<name>.json` of the first of the configuration `folders` that has it.

    Raises:
        UserError: it is not readable as a JSON object.
    """
    for folder in folders:
        path = folder / "model" / f"{name}.json"
        if not path.is_file():
            continue
        try:
            # Of the user's own configuration folder, as the YAML beside it is.
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no JSON object: put the model's config.json there")
        # What transformers keeps for itself is not a setting.
        return {name: value for name, value in found.items() if not name.startswith("_")}
    return None


def complete(model: ModelConfig, published: Mapping[str, Any] | None) -> ModelConfig:
    """`model` with the whole configuration in `config`: what is `published` beside the YAML, with
    the given fields over it. One that has all of `WHOLE`, as a record's does, takes its place.

    Raises:
        UserError: there is no configuration, or weights that are read are to have another one.
    """
    given, whole = model.config, set(model.config) >= WHOLE
    if published is None and not whole and (model.draws_weights or model.path is None):
        raise UserError(
            f"model={model.name} has no configuration: put its config.json beside the YAML as "
            f"model/{model.name}.json, or give a folder with the model as model.path=DIR"
        )
    known = published or {}
    changed = [name for name, value in given.items() if name not in known or known[name] != value]
    fixed = [] if model.draws_weights else changed
    if whole and (model.path is not None or published is None):
        fixed = []  # What is read will tell.
    elif model.path is None:
        # Fewer positions than a model has can be asked of it.
        fixed = [name for name in fixed if name != "max_position_embeddings"]
    if fixed:
        name = fixed[0]
        raise UserError(
            f"model.config={{{name}: {given[name]}}} is not valid: weights that are read have the "
            "configuration that they were trained with; add model.weights=random to draw others"
        )
    # The paper's denominator belongs to the published configuration.
    nominal = None if changed else model.nominal_parameters
    config = dict(given) if whole else {**known, **given}
    return dataclasses.replace(model, config=config, nominal_parameters=nominal)
