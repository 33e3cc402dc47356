from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from composed import compose
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel

from mixlora_exp.config.schema import ModelConfig, ModelSource, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models import (
    base_of,
    identify,
    known_identity,
    load_model,
    load_tokenizer,
    reading,
    with_own_shape,
)
from mixlora_exp.models.tiny import TOKENIZER_SIZE

Tiny = Callable[..., ModelConfig]
Same = Callable[[PreTrainedModel, PreTrainedModel], bool]


HUB = {"source": ModelSource.hub, "hub_id": "owner/model", "access": "accept the licence there"}


def refuse_hub(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def hub_error(kind: type[Exception]) -> Exception:
    request = httpx.Request("GET", "https://hub.invalid/owner/model")
    return kind("refused", response=httpx.Response(403, request=request))


def test_random_weights_of_a_hub_model_need_no_hub(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_hub(monkeypatch, hub_error(GatedRepoError))
    config = tiny(**HUB, weights=Weights.random)
    model = load_model(config, torch.float32)
    assert identify(config, model) == {
        "source": "random",
        "id": "tiny",
        "revision": None,
        "commit": None,
        "fingerprint": base_of(model).fingerprint,
    }
    assert len(load_tokenizer(config)) == TOKENIZER_SIZE


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(GatedRepoError), ["access is gated", "accept the licence there"]),
        (hub_error(RepositoryNotFoundError), ["does not exist", "accept the licence there"]),
        (hub_error(RevisionNotFoundError), ["model.revision=v9 does not exist"]),
        (LocalEntryNotFoundError("no network"), ["cannot be reached", "accept the licence there"]),
        (OSError(errno.EROFS, "Read-only file system"), ["Read-only file system"]),
    ],
)
@pytest.mark.parametrize("load", [lambda c: load_model(c, torch.float32), load_tokenizer])
def test_hub_failures_are_one_error(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str], load
) -> None:
    refuse_hub(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        load(tiny(**HUB, revision="v9"))
    message = str(caught.value)
    assert "\n" not in message
    for word in ("model=tiny", "owner/model", "model.path=DIR", *words):
        assert word in message


@pytest.fixture
def hub_cache(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's cache with `owner/model`, whose branch v1 is at the returned commit."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "hub" / "models--owner--model"
    (repository / "snapshots").mkdir(parents=True)
    folder.rename(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commit


def test_hub_model_and_its_identity(tiny: Tiny, same: Same, hub_cache: str) -> None:
    config = tiny(**HUB, revision="v1")
    model = load_model(config, torch.float32)
    assert same(model, load_model(tiny(), torch.float32, seed=3))
    assert len(load_tokenizer(config)) == TOKENIZER_SIZE
    sign = base_of(model).fingerprint
    expected = {"source": "hub", "id": "owner/model", "revision": "v1", "commit": hub_cache}
    assert identify(config, model) == {**expected, "fingerprint": sign}
    assert identify(config) == {**expected, "commit": None, "fingerprint": None}
    # The files of the cache tell, without the network and before anything is loaded.
    assert sign.startswith("files-1:")
    assert known_identity(config, 0).fingerprint == sign
    pinned = tiny(**HUB, revision=hub_cache)
    assert identify(pinned, load_model(pinned, torch.float32))["commit"] == hub_cache


def test_hub_model_is_checked_before_its_weights_are_read(
    tiny: Tiny, hub_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(
        UserError, match=r"model\.config\.num_key_value_heads=4 does not match owner/model.* has 2"
    ):
        load_model(tiny(**HUB, num_key_value_heads=4, revision="v1"), torch.float32)


def test_a_repository_alone_gives_the_shape(hub_cache: str, tmp_path: Path) -> None:
    """No file in conf/model, no size on the command line."""
    config = compose(["model.hub_id=owner/model", "model.revision=v1"]).model
    assert (config.name, config.config, config.source.value) == ("model", {}, "hub")
    found = with_own_shape(config)
    assert found.config["hidden_size"] == load_model(found, torch.float32).config.hidden_size
    # A chosen model keeps its shape: the repository is a mirror of it.
    mirror = compose(["model=llama3_8b", "model.hub_id=owner/model"]).model
    assert (mirror.name, mirror.config["hidden_size"]) == ("llama3_8b", 4096)
    with pytest.raises(UserError, match="model.revision=v9 does not exist|cannot be reached"):
        with_own_shape(dataclasses.replace(config, revision="v9"))
    with pytest.raises(UserError, match="add model.path=DIR or model.hub_id=ID"):
        compose(["model=own"])
    named = compose([f"model.path={tmp_path}/my model.v2/"]).model
    assert named.name == "my_model.v2"
