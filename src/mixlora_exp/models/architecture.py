"""A model's transformers configuration: built from JSON, read from folders, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__
from transformers.utils import CONFIG_NAME

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.errors import UserError, did_you_mean, shown
from mixlora_exp.models.file_cache import content
from mixlora_exp.models.folder import check_settings
from mixlora_exp.system.untrusted import parse_json

COMPARED = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""Fields that determine number and shapes of the weights; revisions of a repository may differ in
other fields."""
OLDER = {
    "model_type", "torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq",
    "sliding_window_pattern", "cache_implementation",
}  # fmt: skip
"""Fields of a `config.json` that its class does not list but accepts."""
PASSED_OVER = {"architectures", "transformers_version", "auto_map"}
"""Fields of a `config.json` that are ignored: they describe the code that wrote it."""


def has_builtin_tokenizer(config: ModelConfig) -> bool:
    """Return whether the tokenizer is `tiny.build_tokenizer`: for random weights without `path`."""
    return config.draws_weights and config.path is None


def _known_fields(kind: str) -> set[str]:
    made = CONFIG_MAPPING[kind]
    return {f.name for f in dataclasses.fields(made)} | set(made.attribute_map) | OLDER


def _made(found: Mapping[str, Any], origin: str) -> PreTrainedConfig:
    """Return the configuration object of a `config.json`.

    Raises:
        UserError: `model_type` is unknown to transformers, or a value is not valid.
    """
    kind = found.get("model_type")
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(str(kind), CONFIG_MAPPING)
        raise UserError(
            f"{origin}: model_type={shown(str(kind), 60)} is unknown to transformers {__version__}"
            f"{hint}; a later version of transformers may know it"
        )
    try:
        return CONFIG_MAPPING[kind](**{k: v for k, v in found.items() if k not in PASSED_OVER})
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{origin}: cannot read {CONFIG_NAME} ({reason}): correct it, or copy the model again"
        ) from error


def build_hf_config(config: ModelConfig) -> PreTrainedConfig:
    """Return the transformers configuration of the group `model`.

    Raises:
        UserError: a field is unknown to the configuration class, or a value is not valid.
    """
    origin = f"model={config.name}"
    made = _made(config.config, origin)  # Refuses an unknown model_type.
    known = _known_fields(made.model_type)
    for name in config.config:
        if name not in known | PASSED_OVER:
            raise UserError(
                f"model.config.{name}={shown(str(config.config[name]), 60)} is not a field of "
                f"{type(made).__name__}: correct it, or remove it{did_you_mean(name, known)}"
            )
    tokens: dict[str, int | None] = {"pad_token_id": None}
    if has_builtin_tokenizer(config):
        # The ids of `tiny.build_tokenizer`. transformers sets the embedding row of `pad_token_id`
        # to zero; published architectures with random weights have no such row.
        padding = 0 if config.source is ModelSource.random else None
        tokens = {"pad_token_id": padding, "bos_token_id": 1, "eos_token_id": 2}
    return _made({**config.config, **tokens}, origin)


def architecture_of(config: ModelConfig) -> PreTrainedConfig:
    """Return the configuration of the model to load: from the folder `path`, or from the group's
    `config`.

    Raises:
        UserError: it cannot be read.
    """
    if config.path is None or config.draws_weights:
        return build_hf_config(config)
    return read_hf_config(Path(config.path).expanduser(), f"model.path={config.path}")


def with_folder_shape(config: ModelConfig) -> ModelConfig:
    """Return the group `model` with the configuration of the model in `path`, if weights are loaded
    there.

    A folder without a readable `config.json` is not an error here: `load_model` refuses it.
    """
    if config.path is None or config.draws_weights:
        return config
    folder = Path(config.path).expanduser()
    try:
        return shape_in(config, folder, architecture_of(config))
    except (UserError, OSError, ValueError):
        return config


def shape_in(config: ModelConfig, folder: Path, made: PreTrainedConfig) -> ModelConfig:
    """Return the group `model` with the fields of the `config.json` in `folder`, read as `made`."""
    found = parse_json(content(folder / CONFIG_NAME))
    # Records contain the fields of the class, not those of every model, such as label names.
    any_model = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    known = _known_fields(made.model_type) - any_model
    kept = {name: value for name, value in found.items() if name in known}
    same = all(config.config.get(name) == getattr(made, name, None) for name in COMPARED)
    # The paper's denominator does not apply to another architecture.
    nominal = config.nominal_parameters if same else None
    return dataclasses.replace(config, config=kept, nominal_parameters=nominal)


def positions_of(config: ModelConfig) -> int:
    """Maximum number of tokens that the model has positions for."""
    made = architecture_of(config)
    rope = getattr(made, "rope_parameters", None) or {}
    # These two types extend the positions without changing max_position_embeddings.
    stretched = rope.get("rope_type") in ("linear", "dynamic")
    return int(made.max_position_embeddings * (rope.get("factor", 1.0) if stretched else 1.0))


def read_hf_config(folder: Path, origin: str) -> PreTrainedConfig:
    """Return the configuration in a model's folder, read as plain data.

    Raises:
        UserError: it is missing or damaged, or requests other code.
    """
    try:
        found = parse_json(content(folder / CONFIG_NAME))
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{origin}: cannot read {CONFIG_NAME} ({reason}): copy the model again"
        ) from error
    check_settings(found, origin)
    return _made(found, origin)


def check_shape(config: ModelConfig, loaded: PreTrainedConfig, origin: str) -> None:
    """Compare a loaded model's configuration with the JSON file next to its YAML.

    Raises:
        UserError: a field of `COMPARED` differs, or the model has fewer positions.
    """
    expected = build_hf_config(config)
    for name in COMPARED:
        own, found = getattr(expected, name, None), getattr(loaded, name, None)
        if own != found:
            raise UserError(
                f"model.config.{name}={own} does not match {origin}, which has {found}: set it to "
                "that"
            )
    # Longer inputs were refused earlier, based on this number.
    if loaded.max_position_embeddings < expected.max_position_embeddings:
        raise UserError(
            f"model.config.max_position_embeddings={expected.max_position_embeddings} does not "
            f"match {origin}, which has {loaded.max_position_embeddings}: set it to that"
        )
