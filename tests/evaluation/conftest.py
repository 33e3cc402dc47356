"""What the tests of scoring share: tiny models whose adapters do something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from composed import compose
from torch import nn
from transformers import PreTrainedTokenizerBase

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.config.schema import DataConfig, DataSource
from mixlora_exp.data.sources import load_split
from mixlora_exp.evaluation import Scorer
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.precision import autocast
from mixlora_exp.tasks import Item

CPU = torch.device("cpu")


def build_model(method: str, model: str = "tiny", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model with an adapter of `method` whose weights are all away from their start."""
    config = compose([f"model={model}", f"method={method}"])
    base = load_model(config.model, dtype, seed=5)
    base.set_attn_implementation("eager")
    if method == "none":
        return base
    adapted = attach_adapter(base, config.method, config.kernel, seed=6)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "lora_router" in name:
                noise = torch.randn(weight.shape, generator=generator) * 0.3
                weight += noise.to(weight.dtype)
    return adapted


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    return build_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose(["model=tiny"]).model)


@pytest.fixture(scope="session")
def data() -> DataConfig:
    return DataConfig(name=DataSource.embedded)


@pytest.fixture(scope="session")
def items(data: DataConfig) -> Callable[..., list[Item]]:
    def load(task: str = "arc_e", count: int = 16) -> list[Item]:
        return load_split(data, task, "test").items[:count]

    return load


@pytest.fixture
def scorer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Scorer]:
    def make(
        model: nn.Module,
        batch_tokens: int = 600,
        dtype: torch.dtype = torch.float32,
        dropout_seed: int | None = None,
    ) -> Scorer:
        return Scorer(model, tokenizer, autocast(CPU, dtype), batch_tokens, dropout_seed)

    return make
