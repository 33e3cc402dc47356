from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixlora_exp.config.schema import ModelConfig, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models import identify, load_model, load_tokenizer, reading
from mixlora_exp.models.tiny import TOKENIZER_SIZE

Tiny = Callable[..., ModelConfig]
Same = Callable[[PreTrainedModel, PreTrainedModel], bool]


FAMILY = pytest.mark.parametrize("family", ["llama", "gemma"])


@FAMILY
def test_folder_round_trip(tiny: Tiny, same: Same, family: str, tmp_path: Path) -> None:
    config = tiny(family)
    model, tokenizer = load_model(config, torch.float32), load_tokenizer(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # The folder's shape wins over the YAML's.
    read = tiny(family, path=str(tmp_path), num_hidden_layers=9, hidden_size=128)
    again = load_model(read, torch.float32)
    assert same(model, again)
    assert not again.training
    assert load_model(read, torch.bfloat16).dtype is torch.bfloat16
    text = "Answer: true</s> 12"
    assert load_tokenizer(read)(text).input_ids == tokenizer(text).input_ids


def test_weights_go_to_the_device_as_they_are_read(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process of several would otherwise hold the whole model in host memory first."""
    asked = []
    read = AutoModelForCausalLM.from_pretrained

    def spy(*args: object, **options: object) -> object:
        asked.append(options.get("device_map"))
        return read(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    device = torch.device("meta")
    model = load_model(tiny(path=str(folder)), torch.float32, device=device)
    assert asked == [{"": device}]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_random_weights_keep_the_tokenizer_of_the_folder(tiny: Tiny, folder: Path) -> None:
    config = tiny(path=str(folder), weights=Weights.random, num_hidden_layers=1)
    assert len(load_model(config, torch.float32).model.layers) == 1
    assert len(load_tokenizer(config)) == TOKENIZER_SIZE
    assert identify(config)["source"] == "random"


def test_identity_of_a_folder(tiny: Tiny, folder: Path) -> None:
    config = tiny(path=str(folder))
    first = identify(config)
    assert first["source"] == "path"
    assert first["fingerprint"].startswith("files-1:")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert identify(config)["fingerprint"] != first["fingerprint"]
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert identify(config)["config_sha256"] != first["config_sha256"]


def test_missing_folder(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(path=str(tmp_path / "none"))
    for call in (lambda: load_model(config, torch.float32), lambda: load_tokenizer(config)):
        with pytest.raises(UserError, match=r"model\.path=.*none does not exist"):
            call()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_incomplete_folder(tiny: Tiny, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"has no ({name}|weights \(\*\.safetensors\))"):
        load_model(tiny(path=str(folder)), torch.float32)


def test_folder_without_tokenizer(tiny: Tiny, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"model\.path=.* has no tokenizer"):
        load_tokenizer(tiny(path=str(folder)))


def test_folder_with_settings_of_a_tokenizer_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Of them transformers makes a Gemma tokenizer that knows nothing but its special tokens."""
    config = tiny("gemma")
    load_model(config, torch.float32).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    with pytest.raises(UserError, match=r"model\.path=.* has no tokenizer"):
        load_tokenizer(tiny("gemma", path=str(tmp_path)))


def test_cut_off_weights(tiny: Tiny, folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(UserError, match="a weight file is truncated or damaged") as caught:
        load_model(tiny(path=str(folder)), torch.float32)
    assert str(folder) in str(caught.value)


def test_broken_config(tiny: Tiny, folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        load_model(tiny(path=str(folder)), torch.float32)


def test_lacking_weights_are_not_invented(tiny: Tiny, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 weights.* model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        load_model(tiny(path=str(folder)), torch.float32)


def test_weights_of_another_shape_than_their_config(tiny: Tiny, folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["intermediate_size"] = 160
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot load the weights of"):
        load_model(tiny(path=str(folder)), torch.float32)


def test_remote_code_is_never_run(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "other", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError):
        load_model(tiny(path=str(folder)), torch.float32)
    assert not (tmp_path / "ran").exists()


def test_loading_shows_no_progress_bar(
    tiny: Tiny, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    load_model(tiny(path=str(folder)), torch.float32)
    assert "%|" not in capfd.readouterr().err
    with reading.quiet():
        pass
    assert reading.transformers_logging.is_progress_bar_enabled()
