"""Whole layers under `torch.compile`, as one graph."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, LlamaConfig

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.weight_cache import prepare_compiled


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layer_of(model_of, name: str, **changes) -> nn.Module:
    model = model_of(**changes)
    set_kernel(model, "exact")
    return model.base_model.model.model.layers[0].get_submodule(name)


LAYERS = pytest.mark.parametrize("name", ["mlp", "self_attn.q_proj"])


@LAYERS
def test_layer_is_one_graph_with_the_same_results(model_of, dora, name) -> None:
    """Output and gradients, traced with the backward pass; fullgraph=True raises where the graph
    would break."""
    layer = layer_of(model_of, name, use_dora=dora).train()
    torch.manual_seed(0)
    x = torch.randn(2, 9, 64)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
        found.append((y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)))
    assert len(found[0]) == len(found[1]) > 3
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@LAYERS
def test_compiled_norms_follow_the_optimizer(model_of, name) -> None:
    """A norm from the cache must not become a constant of the graph."""
    layer = layer_of(model_of, name, use_dora=True).train()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 9, 64)
    weights = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    for _ in range(3):
        y = compiled(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@LAYERS
def test_norms_at_hand_are_read_and_followed(model_of, monkeypatch, name) -> None:
    """Made before the pass, none is made in it; a step of the optimizer needs no new graph."""
    layer = layer_of(model_of, name, use_dora=True).train()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    x = torch.randn(2, 9, 64)
    weights = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    for _ in range(3):
        prepare_compiled(layer, torch.float32)
        wanted = layer(x)
        with monkeypatch.context() as patch:
            patch.setattr("mixlora_exp.adapters.weight_cache._made_now", None)
            y = compiled(x)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1


@LAYERS
def test_compiled_dropout(model_of, dora, name) -> None:
    """Masks are drawn anew in each pass, and none in evaluation."""
    layer = layer_of(model_of, name, use_dora=dora, lora_dropout=0.3).train()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 9, 64)
    assert not torch.allclose(compiled(x), compiled(x))
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_lora_has_fewer_kernels_than_peft_s() -> None:
    """In a decoder layer, forward and backward on a CPU under autocast, dropout drawn inside."""
    launched = {}
    for kernel in ("exact", "peft"):
        torch.compiler.reset()
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
        )
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model
        lora = LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear")
        model = get_peft_model(base, lora).train()
        set_kernel(model, kernel)
        layer = torch.compile(base.layers[0], fullgraph=True)
        h = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        positions = base.rotary_emb(h, torch.arange(16).unsqueeze(0))

        def step(layer=layer, h=h, positions=positions) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(h, attention_mask=None, position_embeddings=positions)
            y.sum().backward()

        _, sources = run_and_get_code(step)
        calls = re.compile(
            r"^\s+(?:[\w, ]+ = )?(?:extern_kernels|aten|torch\.ops|cpp_fused)[\w.]*\("
        )
        launched[kernel] = sum(
            bool(calls.match(line))
            for source in sources
            for line in source[source.index("def call") :].splitlines()
        )
    assert 7 * 8 < launched["exact"] < launched["peft"], launched
