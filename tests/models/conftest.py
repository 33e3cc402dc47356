from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mixlora_exp.config.schema import Family, ModelConfig, ModelSource
from mixlora_exp.models import load_model, load_tokenizer

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "tie_embeddings",
)
TINY = {
    Family.llama: (64, 176, 2, 4, 2, 16, 1024, False),
    Family.gemma: (64, 192, 2, 4, 1, 32, 1024, True),
}


def make_tiny(family: Family = Family.llama, **changes: object) -> ModelConfig:
    values = {
        "name": "tiny",
        "source": ModelSource.random,
        **dict(zip(FIELDS, TINY[family], strict=True)),
    }
    return ModelConfig(family=family, **{**values, **changes})


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return model.state_dict()


def have_same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    one, other = state(first), state(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """The configuration of a tiny model of a family, with changed fields."""
    return make_tiny


@pytest.fixture
def same() -> Callable[[PreTrainedModel, PreTrainedModel], bool]:
    """Whether two models have the same weights."""
    return have_same_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny LLaMA, saved with its tokenizer."""
    path = tmp_path / "model"
    load_model(make_tiny(), torch.float32, seed=3).save_pretrained(path)
    load_tokenizer(make_tiny()).save_pretrained(path)
    return path
