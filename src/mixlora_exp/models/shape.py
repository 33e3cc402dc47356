"""A model's shape: from YAML to a transformers config, and the check of what was loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub.errors import StrictDataclassError
from transformers import GemmaConfig, LlamaConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from mixlora_exp.config.schema import Family, ModelConfig, ModelSource, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models.families import FAMILIES
from mixlora_exp.system.untrusted import read_json

__all__ = [
    "build_hf_config",
    "check_family",
    "check_shape",
    "draws_weights",
    "has_builtin_tokenizer",
    "positions_of",
    "read_hf_config",
    "with_folder_shape",
]

_CONFIG_CLASSES: dict[Family, type[PreTrainedConfig]] = {
    Family.llama: LlamaConfig,
    Family.gemma: GemmaConfig,
}

# Field of `ModelConfig` -> attribute of the transformers config. Only what decides the number and
# the form of the weights: revisions of one repository may differ in the rest.
_COMPARED = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
}


def draws_weights(config: ModelConfig) -> bool:
    """Whether the weights are drawn here, in the shape of the YAML."""
    if config.weights is Weights.random:
        return True
    return config.source is ModelSource.random and config.path is None


def has_builtin_tokenizer(config: ModelConfig) -> bool:
    """Whether the tokenizer is `tiny.build_tokenizer`: that of random weights, unless a folder is
    given, whose tokenizer then serves."""
    return draws_weights(config) and config.path is None


def build_hf_config(config: ModelConfig) -> PreTrainedConfig:
    """Return the transformers config of the shape in the YAML, cut to `config.depth` layers."""
    special_tokens: dict[str, int | None] = {"pad_token_id": None}
    if has_builtin_tokenizer(config):
        # The ids of `tiny.build_tokenizer`. Padding gets a row of zeros from transformers; the
        # published models that only borrow the tokenizer have none such.
        padding = 0 if config.source is ModelSource.random else None
        special_tokens = {"pad_token_id": padding, "bos_token_id": 1, "eos_token_id": 2}
    return _CONFIG_CLASSES[config.family](
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_embeddings,
        hidden_act=FAMILIES[config.family].activation,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_positions,
        **special_tokens,
    )


def with_folder_shape(config: ModelConfig) -> ModelConfig:
    """The configuration with the shape of the model in `model.path`, if that is what is loaded.

    A folder without a readable `config.json` is left to `load_model` to refuse.
    """
    hf_config = _folder_config(config)
    if hf_config is None:
        return config
    shape = {field: getattr(hf_config, attribute) for field, attribute in _COMPARED.items()}
    if all(getattr(config, field) == value for field, value in shape.items()):
        return config
    # The paper's denominator belongs to the shape that is left behind.
    return dataclasses.replace(config, **shape, nominal_parameters=None)


def positions_of(config: ModelConfig) -> int:
    """How many tokens of a text the model has positions for: the YAML's number, or what the
    `config.json` of `model.path` says."""
    hf_config = _folder_config(config)
    if hf_config is None:
        return config.max_positions
    rope = hf_config.rope_parameters or {}
    # These two stretch the positions of a model whose configuration keeps the number before.
    stretched = rope.get("rope_type") in ("linear", "dynamic")
    return int(hf_config.max_position_embeddings * (rope.get("factor", 1.0) if stretched else 1.0))


def _folder_config(config: ModelConfig) -> PreTrainedConfig | None:
    """What the folder says that is loaded; None where none is, or it has no readable file."""
    if config.path is None or config.weights is Weights.random:
        return None
    try:
        return read_hf_config(Path(config.path).expanduser(), config, "model.path")[0]
    except UserError:
        return None


def read_hf_config(folder: Path, config: ModelConfig, origin: str) -> tuple[PreTrainedConfig, bool]:
    """The configuration in a model's folder, read as plain values, and whether its weights are
    stored as they are (and not quantised).

    Raises:
        UserError: there is none, it is damaged, or it is of another family than the YAML names.
    """
    path = folder / CONFIG_NAME
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        check_family(config, SimpleNamespace(model_type=found.get("model_type")), origin)
        plain = not found.get("quantization_config")
        return _CONFIG_CLASSES[config.family](**found), plain
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model={config.name}: cannot read {CONFIG_NAME} of {origin} ({reason}): take another "
            "copy of the model"
        ) from error


def check_family(config: ModelConfig, loaded: PreTrainedConfig, origin: str) -> None:
    """Raise a `UserError` when the loaded model is not of the family that the YAML names."""
    expected = FAMILIES[config.family].model_type
    if loaded.model_type != expected:
        raise UserError(
            f"model.family={config.family.value} does not fit {origin}, "
            f"whose model_type is {loaded.model_type}"
        )


def check_shape(config: ModelConfig, loaded: PreTrainedConfig, origin: str) -> None:
    """Raise a `UserError` that names the first field in which the loaded model differs."""
    check_family(config, loaded, origin)
    for field, attribute in _COMPARED.items():
        expected, found = getattr(config, field), getattr(loaded, attribute)
        if expected != found:
            raise UserError(
                f"model.{field}={expected} does not fit {origin}, whose {attribute} is {found}"
            )
    # What is longer than this is refused before anything is loaded.
    if loaded.max_position_embeddings < config.max_positions:
        raise UserError(
            f"model.max_positions={config.max_positions} does not fit {origin}, which has "
            f"{loaded.max_position_embeddings}: set it to that"
        )
