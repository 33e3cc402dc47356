"""Gemma 3 with sliding and full attention: adapters compute what PEFT's do, past the window too."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from composed import compose
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from mixlora_exp.adapters import attach_adapter, set_kernel
from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.models import load_model

LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
SHAPE = {
    "model_type": "gemma3_text", "hidden_size": 48, "intermediate_size": 80, "head_dim": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 512,
    "max_position_embeddings": 128, "sliding_window": 6, "layer_types": LAYERS,
    "query_pre_attn_scalar": 16, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    """With norms drawn around their values, q and k norms and those around each block too."""
    config = ModelConfig(name="small", source=ModelSource.random, config=SHAPE)
    model = load_model(config, torch.float32, seed=1)
    generator = torch.Generator().manual_seed(5)
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 3 * 6 + 1
    with torch.no_grad():
        for weight in norms:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    """Two rows of 20 and 13 tokens, longer than the window."""
    ids = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def drawn(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_loss_and_gradients_are_those_of_peft(base, rows, method: str) -> None:
    config = compose(["model=tiny", f"method={method}", "method.rank=4", "method.dropout=0"])
    ours = attach_adapter(deepcopy(base), config.method, config.kernel, 0).train()
    plain = LoraConfig(
        r=4, lora_alpha=config.method.alpha, use_dora=method == "dora", task_type="CAUSAL_LM",
        target_modules=list(config.method.targets),
    )  # fmt: skip
    theirs = get_peft_model(deepcopy(base), plain).train()
    drawn(ours)
    drawn(theirs)
    losses = [model(**rows).loss for model in (ours, theirs)]
    without = base(**rows).loss
    assert abs(losses[1] - without) > 0.01
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    found = [
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for model in (ours, theirs)
    ]
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_experts_are_those_of_the_kernel_without_shortcuts(base, rows, method: str) -> None:
    config = compose(["model=tiny", f"method={method}", "method.rank=4", "method.dropout=0"])
    model = attach_adapter(deepcopy(base), config.method, config.kernel, 0).train()
    drawn(model)
    losses = {}
    for kernel in ("reference", "exact"):
        set_kernel(model, kernel)
        losses[kernel] = model(**rows).loss.item()
    assert losses["exact"] == pytest.approx(losses["reference"], abs=1e-5)


def test_the_window_counts(base, rows) -> None:
    """Else the comparison above would say nothing about it."""
    wide = deepcopy(base)
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = 100
    wide.config.sliding_window = 100
    assert abs(wide(**rows).loss - base(**rows).loss) > 1e-4
