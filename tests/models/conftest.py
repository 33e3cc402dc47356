from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.models import load_model, load_tokenizer

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
TINY = {
    "llama": (64, 176, 2, 4, 2, 16, 1024, False),
    "gemma": (64, 192, 2, 4, 1, 32, 1024, True),
}
OWN = {field.name for field in dataclasses.fields(ModelConfig)}


def make_tiny(kind: str = "llama", **changes: object) -> ModelConfig:
    """`changes` are fields of the group `model`, or of its `config`."""
    shape = {"model_type": kind, **dict(zip(FIELDS, TINY[kind], strict=True))}
    shape |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 10000.0}
    shape |= {name: value for name, value in changes.items() if name not in OWN}
    own = {name: value for name, value in changes.items() if name in OWN}
    return ModelConfig(**{"name": "tiny", "source": ModelSource.random, "config": shape, **own})


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
