"""Every method on tiny models of other architectures: biases, norms around and inside of the
projections, scaled embeddings, capped logits, tied heads."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from composed import compose
from cpu_kernels import CPU_KERNELS
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from mixlora_exp.adapters import attach_adapter, load_adapter, save_adapter, set_kernel
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.models import load_model
from mixlora_exp.models.parameters import count_parameters

SHAPE = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 256,
}  # fmt: skip
KINDS = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},  # Biases on q, k and v.
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 6},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6},
    "olmo2": {},
    "smollm3": {"attention_bias": True},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "mlp_bias": True,
    },
}  # fmt: skip
SMALL = ["method.rank=2", "method.alpha=4"]
METHODS = PAPER_METHODS
KIND = pytest.mark.parametrize("kind", KINDS)


def model_of_kind(kind: str) -> ModelConfig:
    config = {"model_type": kind, **SHAPE, **KINDS[kind]}
    return ModelConfig(name="small", source=ModelSource.random, config=config)


@cache
def built(kind: str) -> PreTrainedModel:
    model = load_model(model_of_kind(kind), torch.float32, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def base_of_kind(kind: str) -> PreTrainedModel:
    """With drawn biases and norms, which are zero and one at first."""
    return deepcopy(built(kind))


def test_the_biases_are_where_they_are_said_to_be() -> None:
    def biased(kind: str) -> set[str]:
        modules = built(kind).named_modules()
        linear = [(n, m) for n, m in modules if isinstance(m, nn.Linear) and m.bias is not None]
        return {name.rpartition(".")[2] for name, module in linear if module.bias.abs().max() > 0.1}

    assert biased("qwen2") == {"q_proj", "k_proj", "v_proj"}
    assert biased("smollm3") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert biased("granite") == {"gate_proj", "up_proj", "down_proj"}
    assert len(biased("llama")) == 7
    assert not biased("olmo2")


@KIND
@torch.no_grad()
def test_a_block_is_its_definition(config_of, draw, literal, kind, dora) -> None:
    """In float64, but for the router, whose shares are those of float32."""
    torch.manual_seed(0)
    model = get_peft_model(base_of_kind(kind), config_of(use_dora=dora))
    draw(model)
    block = model.double().eval().base_model.feed_forwards()[1]
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    expected = literal(block, x)
    for kernel in CPU_KERNELS:
        set_kernel(model, kernel)
        torch.testing.assert_close(block(x), expected, rtol=1e-6, atol=1e-6, msg=kernel)


@pytest.mark.parametrize("method", METHODS)
@KIND
def test_trained_saved_and_loaded(kind, method, batch, tmp_path: Path) -> None:
    config = compose(["model=tiny", f"method={method}", "method.dropout=0", *SMALL])
    counted = count_parameters(model_of_kind(kind), config.method)
    base = base_of_kind(kind)
    assert sum(p.numel() for p in base.parameters()) == counted.base
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = attach_adapter(base, config.method, config.kernel, seed=0).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == counted.trainable

    def loss(kernel: str) -> float:
        set_kernel(model, kernel)
        return model(**batch).loss.item()

    start = loss("exact")
    assert start == pytest.approx(loss("reference"), rel=1e-5)
    set_kernel(model, "exact")
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert loss("exact") < start
    assert loss("exact") == pytest.approx(loss("reference"), rel=1e-4)
    # The frozen weights are what they were, under whatever name they now have.
    now = {n.replace(".base_layer", ""): p for n, p in base.state_dict().items()}
    assert all(torch.equal(now[name], weight) for name, weight in before.items())

    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(base_of_kind(kind), tmp_path / "adapter", config.kernel)
    set_kernel(model, config.kernel.name.value)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
