from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_exp.adapters import MixLoraConfig, MixLoraFeedForward
from mixlora_exp.models import load_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {"llama": "tiny", "gemma": "tiny_gemma"}


@cache
def build_base(family: str, dtype: torch.dtype) -> PreTrainedModel:
    return load_model(compose([f"model={MODELS[family]}"]).model, dtype, seed=1)


def make_base(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return deepcopy(build_base(family, dtype))


def make_config(**changes: Any) -> MixLoraConfig:
    values = {"r": 4, "lora_alpha": 8, "num_experts": 4, "task_type": "CAUSAL_LM", **changes}
    return MixLoraConfig(**values)


def draw_adapters(model: nn.Module, seed: int = 7) -> None:
    """Give every trainable tensor random values near its own, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.dtype))


def make_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, drawn: bool = True, **changes: Any
) -> PeftModel:
    """A tiny model with a MixLoRA adapter (MixDoRA with `use_dora`), B random unless told."""
    torch.manual_seed(0)
    model = get_peft_model(make_base(family, dtype), make_config(**changes))
    if drawn:
        draw_adapters(model)
    return model


def make_batch(rows: int = 2, seed: int = 3, length: int = 10) -> dict[str, Tensor]:
    """Random ids; each row but the first ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 1000, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    labels = torch.where(mask.bool(), ids, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def by_definition(block: MixLoraFeedForward, x: Tensor, adapter: str = "default") -> Tensor:
    """Each token and slot by whole matrices, from the parameters as they are named."""

    def project(role: str, expert: int, row: Tensor) -> Tensor:
        frozen = getattr(block.base_layer, f"{role}_proj")
        a, b = (getattr(block, f"lora_{part}_{role}")[adapter][expert] for part in "AB")
        weight = frozen.weight + block.scaling[adapter] * b @ a
        if block.use_dora[adapter]:
            magnitude = getattr(block, f"lora_magnitude_{role}")[adapter][expert]
            weight = (magnitude / weight.norm(dim=1)).unsqueeze(1) * weight
        return weight @ row + (0 if frozen.bias is None else frozen.bias)

    activated, rows = block.base_layer.act_fn, []
    for row in x.reshape(-1, x.shape[-1]):
        shares = (block.lora_router[adapter] @ row).softmax(dim=-1)
        chosen = shares.topk(block.router[adapter].top_k)
        weights = chosen.values / chosen.values.sum()
        parts = [
            w * project("down", e, activated(project("gate", e, row)) * project("up", e, row))
            for w, e in zip(weights, chosen.indices.tolist(), strict=True)
        ]
        rows.append(sum(parts))
    return torch.stack(rows).view_as(x)


@pytest.fixture
def literal() -> Callable[..., Tensor]:
    return by_definition


@pytest.fixture(params=[False, True], ids=["mixlora", "mixdora"])
def dora(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=list(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base_of() -> Callable[..., PreTrainedModel]:
    return make_base


@pytest.fixture
def config_of() -> Callable[..., MixLoraConfig]:
    return make_config


@pytest.fixture
def model_of() -> Callable[..., PeftModel]:
    return make_model


@pytest.fixture
def draw() -> Callable[..., None]:
    return draw_adapters


@pytest.fixture
def batch_of() -> Callable[..., dict[str, Tensor]]:
    return make_batch


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return make_batch()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models run faster, and to the same bit, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Kit:
    """Random adapters on tiny models."""

    base_of: Callable[..., Any]
    config_of: Callable[..., Any]
    draw: Callable[..., None]
    batch: dict[str, Tensor]

    def adapter(
        self, folder: Path, kind: str = "mixlora", family: str = "llama", **changes: Any
    ) -> tuple[Path, Tensor]:
        """A PEFT folder of an adapter, and its logits."""
        changes = {"lora_dropout": 0.05, **changes}
        if kind == "mixlora":
            config = self.config_of(**changes)
        else:
            config = LoraConfig(
                **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM",
                   "use_dora": kind == "dora", **changes}
            )  # fmt: skip
        model = get_peft_model(self.base_of(family), config)
        self.draw(model)
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder, self.of(model)

    @torch.no_grad()
    def of(self, model: PeftModel) -> Tensor:
        return model.eval()(**self.batch).logits

    def logits(self, folder: Path, family: str = "llama") -> Tensor:
        return self.of(PeftModel.from_pretrained(self.base_of(family), str(folder)))


@pytest.fixture
def kit(
    base_of: Callable[..., Any],
    config_of: Callable[..., Any],
    draw: Callable[..., None],
    batch: dict[str, Tensor],
) -> Kit:
    return Kit(base_of, config_of, draw, batch)
