"""A small Llama in bf16 whose adapters run as on a GPU, so that launches can be counted without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from mixlora_exp.adapters import MixLoraConfig, set_kernel
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.config.schema import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from mixlora_exp.kernels import DropoutStream, lora, resolve_kernel


def run_as_on_a_card(patch: pytest.MonkeyPatch, start: Callable[..., None]) -> None:
    """Choose a GPU's operators on a CPU; `start` stands for the launch of a Triton kernel."""
    from mixlora_exp.kernels.triton import block, linear_launch, router

    for name, module in list(sys.modules.items()):
        if name.startswith("mixlora_exp.kernels.triton.") and hasattr(module, "start"):
            patch.setattr(module, "start", start)
    patch.setattr(lora, "steps_on", lambda device: linear_launch)
    patch.setattr(linear_launch, "supports", lambda *arguments: True)
    patch.setattr(block, "supports", lambda *arguments: True)
    patch.setattr(router, "INTERPRETED", True)


def small_llama(layers: int) -> Any:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def with_adapter(base: Any, method: str, stream: DropoutStream) -> Any:
    """The base in training with the adapter of a method; `frozen`: its embeddings alone train, so
    that each layer's input has a gradient."""
    if method == "frozen":
        base.model.embed_tokens.weight.requires_grad_(True)
        return base.train()
    mixture = method.startswith("mix")
    common = {
        "r": 16 if mixture else 80, "lora_alpha": 32, "lora_dropout": 0.05,
        "use_dora": method.endswith("dora"),
        "target_modules": [*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS],
    }  # fmt: skip
    settings = MixLoraConfig(**common, num_experts=8, top_k=2) if mixture else (
        LoraConfig(**common, task_type="CAUSAL_LM")
    )  # fmt: skip
    model = get_peft_model(base, settings)
    set_kernel(model, "triton" if mixture else resolve_kernel("auto", "cuda"))
    use_dropout_stream(model, "default", stream)
    return model.train()
