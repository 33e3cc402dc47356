"""What loading a model would refuse, as far as files at hand tell: no weights are read, nothing is
downloaded or converted."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.errors import UserError
from mixlora_exp.models.architecture import build_hf_config, check_shape, read_hf_config
from mixlora_exp.models.base_identity import hub_snapshot
from mixlora_exp.models.loading import local_folder
from mixlora_exp.models.pypi import cached_folder, find_gguf, is_cached
from mixlora_exp.models.skeleton import skeleton
from mixlora_exp.models.weight_files import stored_tensors

__all__ = ["check_model"]


def _check_weights(folder: Path, found: PreTrainedConfig, config: ModelConfig, origin: str) -> None:
    stored = stored_tensors(folder)
    # A tied head, which is the embedding, is not stored.
    needed = dict(skeleton(found, origin).named_parameters())
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
    if config.draws_weights:
        skeleton(build_hf_config(config), f"model={config.name}")
    elif config.path is not None:
        folder, origin = local_folder(config), f"model.path={config.path}"
        _check_weights(folder, read_hf_config(folder, origin), config, origin)
    elif config.source is ModelSource.pypi:
        skeleton(build_hf_config(config), f"model={config.name}")
        if here:
            find_gguf(config)
        if is_cached(config):
            found = read_hf_config(cached_folder(config), str(config.package))
            check_shape(config, found, str(config.package))
    else:
        skeleton(build_hf_config(config), f"model={config.name}")
        snapshot = hub_snapshot(config.hub_id, config.revision)
        if snapshot is not None:
            found = read_hf_config(snapshot, str(config.hub_id))
            check_shape(config, found, str(config.hub_id))
