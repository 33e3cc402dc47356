"""How many operations LoRA and DoRA add to a decoder layer on a GPU: counted without one, where
operators of torch and the Triton kernels' own are dispatched as there; only numbers are missing."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.linear import FusedLinear
from mixlora_exp.kernels import lora

linear_launch = pytest.importorskip("mixlora_exp.kernels.triton.linear_launch")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FREE = {
    *("view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "detach"),
    *("alias", "as_strided", "_unsafe_view", "permute", "split", "unbind", "unflatten"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_reshape_alias"),
}
"""Operations that launch nothing."""


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.split("::")[1]
        if name not in FREE:
            self.found[name] += 1
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are started and do nothing. Masks and norms are given."""
    part = FusedLinear._part

    def given(layer: FusedLinear, *args: Any, **options: Any):
        if not hasattr(layer, "given_part"):
            layer.given_part = part(layer, *args, **options)
        return layer.given_part

    monkeypatch.setattr(linear_launch, "start", lambda *args, **named: None)
    monkeypatch.setattr(linear_launch, "supports", lambda *args: True)
    monkeypatch.setattr(lora, "steps_on", lambda device: linear_launch)
    monkeypatch.setattr(FusedLinear, "_part", given)


def count(method: str | None) -> Counter[str]:
    """Operations of one layer, forward and backward under autocast. Adapters are in bf16, so that
    gradients of B need no cast, as on a GPU, where a product gives them in float32."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    base = model.model
    if method is not None:
        lora = LoraConfig(r=8, target_modules=TARGETS, use_dora=method == "dora", lora_dropout=0.05)
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        set_kernel(model, "exact")
    model.train()
    h = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    positions = base.rotary_emb(h, torch.arange(16).unsqueeze(0))
    for counted in (contextlib.nullcontext(), Counted()):
        with counted, torch.autocast("cpu", torch.bfloat16):
            y = base.layers[0](h, attention_mask=None, position_embeddings=positions)
        upstream = torch.ones_like(y)
        with counted:
            y.backward(upstream)
        h.grad = None
        for parameter in model.parameters():
            parameter.grad = None
    return counted.found


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_few_operations_beside_the_frozen_layer_s(as_on_a_gpu, method) -> None:
    """Of which stock LoRA takes 154 more."""
    found, frozen = count(method), count(None)
    assert found.total() - frozen.total() <= 30, found - frozen
    # A group's launches: of all A x; per projection B, dlow and dB; of all dA; of dx.
    assert found["lora_low"] == found["lora_a_gradients"] == found["lora_input_gradient"] == 4
    # The gradients of the input come added up.
    assert found["add"] == frozen["add"] - 3
    assert found["_to_copy"] == frozen["_to_copy"]
