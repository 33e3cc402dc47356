"""Checks a model before loading, from local files only: reads no weights, and downloads and
converts nothing."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.errors import UserError
from mixlora_exp.models.architecture import build_hf_config, check_shape, read_hf_config
from mixlora_exp.models.base_identity import hub_snapshot
from mixlora_exp.models.loading import local_folder
from mixlora_exp.models.packaged import gguf_files
from mixlora_exp.models.pypi import cached_folder, is_cached
from mixlora_exp.models.skeleton import skeleton
from mixlora_exp.models.weight_files import stored_tensors


def _check_weights(folder: Path, found: PreTrainedConfig, config: ModelConfig, origin: str) -> None:
    # A tied output projection is the embedding, and not stored separately.
    needed = dict(skeleton(found, origin).named_parameters())
    stored = stored_tensors(folder)
    # Names in a checkpoint of the model without output projection lack the first component.
    places = {name: stored.get(name, stored.get(name.partition(".")[2])) for name in needed}
    missing = sorted(name for name, place in places.items() if place is None)
    if missing:
        raise UserError(
            f"model={config.name}: {origin} lacks {len(missing)} weights, the first {missing[0]}: "
            "copy the model again"
        )
    for name, place in places.items():
        if place.shape != tuple(needed[name].shape):
            raise UserError(
                f"model={config.name}: {origin}: {name} has the shape {list(place.shape)}, but its "
                f"{CONFIG_NAME} requires {list(needed[name].shape)}: copy the model again"
            )


def check_model(config: ModelConfig, *, here: bool = True) -> None:
    """Check a model as far as possible before loading. `here`: it runs on this machine, so a
    package with weights must be installed.

    Raises:
        UserError: loading the model would fail.
    """
    if config.draws_weights:
        skeleton(build_hf_config(config), f"model={config.name}")
    elif config.path is not None:
        folder, origin = local_folder(config), f"model.path={config.path}"
        _check_weights(folder, read_hf_config(folder, origin), config, origin)
    elif config.source is ModelSource.pypi:
        skeleton(build_hf_config(config), f"model={config.name}")
        if here:
            gguf_files(config)
        if is_cached(config):
            found = read_hf_config(cached_folder(config), str(config.package))
            check_shape(config, found, str(config.package))
    else:
        skeleton(build_hf_config(config), f"model={config.name}")
        snapshot = hub_snapshot(config.hub_id, config.revision)
        if snapshot is not None:
            found = read_hf_config(snapshot, str(config.hub_id))
            check_shape(config, found, str(config.hub_id))
