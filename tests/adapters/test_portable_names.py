"""An adapter names its base model without a path of the machine that trained it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from composed import compose

from mixlora_exp.adapters import attach_adapter, save_adapter
from mixlora_exp.adapters.base_check import named_portably
from mixlora_exp.models import BaseIdentity, load_model, load_tokenizer, read_base
from mixlora_exp.models.base_identity import _NOTED

CONFIG = compose(["model=tiny", "method=lora", "method.rank=2"])
COMMIT = "0123456789abcdef" * 2 + "01234567"


def model_at(folder: Path) -> Path:
    load_model(CONFIG.model, torch.float32, seed=3).save_pretrained(folder)
    load_tokenizer(CONFIG.model).save_pretrained(folder)
    return folder


def saved_on(base, folder: Path) -> dict:
    save_adapter(attach_adapter(base, CONFIG.method, CONFIG.kernel, 0), folder)
    for path in folder.iterdir():
        assert str(folder.parent).encode() not in path.read_bytes(), path.name
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_folder_is_named_by_its_last_part(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG.model, path=str(model_at(tmp_path / "my-model")))
    settings = saved_on(load_model(config, torch.float32), tmp_path / "adapter")
    assert settings["base_model_name_or_path"] == "my-model"
    assert read_base(tmp_path / "adapter").id == "my-model"


def test_a_folder_of_the_hub_s_cache_is_named_by_repository_and_commit(tmp_path: Path) -> None:
    place = model_at(tmp_path / "models--owner--model" / "snapshots" / COMMIT)
    config = dataclasses.replace(CONFIG.model, path=str(place))
    settings = saved_on(load_model(config, torch.float32), tmp_path / "adapter")
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/model", COMMIT)
    noted = read_base(tmp_path / "adapter")
    assert (noted.source, noted.id, noted.revision) == ("hub", "owner/model", COMMIT)
    assert noted.fingerprint.startswith("files-1:")


def test_a_package_is_named_with_its_file_s_hash(tmp_path: Path) -> None:
    base = load_model(CONFIG.model, torch.float32)
    base.__dict__[_NOTED] = BaseIdentity("m", "pypi", "pack==1", None, None, None, "ab" * 32)
    base.config.name_or_path = "/home/a/.cache/mixlora_exp/m-0123456789ab"
    settings = saved_on(base, tmp_path / "adapter")
    assert settings["base_model_name_or_path"] == "pack==1"
    assert read_base(tmp_path / "adapter").file_sha256 == "ab" * 32


def test_random_weights_have_no_name(tmp_path: Path) -> None:
    settings = saved_on(load_model(CONFIG.model, torch.float32), tmp_path / "adapter")
    assert settings["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        ("owner/model", "owner/model"),
        ("gpt2", "gpt2"),
        ("/data/model", "model"),
        ("/data/models/model/", "model"),
        ("./model", "model"),
        ("~/model", "model"),
        (r"C:\model", "model"),
        ("a/b/c", "c"),
        ("/", None),
        ("", None),
        (None, None),
    ],
)
def test_a_path_of_an_unknown_base_is_shortened(name: str | None, portable: str | None) -> None:
    found = named_portably({"base_model_name_or_path": name}, None)
    assert found["base_model_name_or_path"] == portable
