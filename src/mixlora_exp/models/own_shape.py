"""The shape of a model that is given by its place alone, from its own `config.json`."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import CONFIG_NAME, cached_file

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.models.architecture import read_hf_config, shape_in, with_folder_shape
from mixlora_exp.models.reading import one_error


def with_own_shape(config: ModelConfig) -> ModelConfig:
    """Return the group `model` with the configuration that the model itself has: in the folder
    `path`, or, for a repository without a `config`, on the hub, from which that one file is
    fetched.

    Raises:
        UserError: the repository's configuration cannot be read.
    """
    if config.path is not None or config.config or config.source is not ModelSource.hub:
        return with_folder_shape(config)
    origin = f"model.hub_id={config.hub_id}"
    with one_error("configuration", str(config.hub_id), config):
        place = cached_file(str(config.hub_id), CONFIG_NAME, revision=config.revision)
    folder = Path(str(place)).parent
    return shape_in(config, folder, read_hf_config(folder, origin))
