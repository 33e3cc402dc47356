"""What a feed-forward block keeps from the forward to the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mixlora_exp.adapters import MixLoraConfig, MixLoraFeedForward, set_kernel
from mixlora_exp.kernels import KERNELS
from mixlora_exp.kernels.mixlora.dense import dense_stage
from mixlora_exp.kernels.mixlora.grouped import grouped_stage
from mixlora_exp.kernels.mixlora.stage import run_stage

STAGES = [pytest.param(grouped_stage, id="grouped"), pytest.param(dense_stage, id="dense")]
TARGETS = ["gate_proj", "up_proj", "down_proj"]
TOKENS = 256
BAR = 0.45
"""The most that a MixLoRA block (E=8, K=2, r=16) may keep of what PEFT's LoRA of equal size (r=80)
keeps."""


def make_mlp(hidden: int, dtype: torch.dtype) -> LlamaMLP:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=int(2.6875 * hidden))
    return LlamaMLP(config).to(dtype).requires_grad_(False)


def make_lora(hidden: int, dtype: torch.dtype, **changes) -> nn.Module:
    options = {"r": 80, "lora_dropout": 0.05, **changes}
    model = nn.ModuleDict({"mlp": make_mlp(hidden, dtype)})
    inject_adapter_in_model(LoraConfig(target_modules=TARGETS, **options), model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as `get_peft_model` does it
            parameter.data = parameter.data.float()
    return model["mlp"].train()


def make_mixlora(hidden: int, dtype: torch.dtype, **changes) -> MixLoraFeedForward:
    options = {"r": 16, "num_experts": 8, "top_k": 2, "lora_dropout": 0.05, **changes}
    config = MixLoraConfig(target_modules=TARGETS, **options)
    return MixLoraFeedForward(make_mlp(hidden, dtype), "default", config, "mlp").train()


def saved_bytes(
    compute: Callable[[Tensor], Tensor], x: Tensor, left_out: list[Tensor] | None = None
) -> int:
    """Bytes of the distinct storages that the graph of `compute(x)` holds, but for `left_out`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in left_out or ()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compute(x)
    assert y.requires_grad
    return sum(kept.values())


def of_module(module: nn.Module, hidden: int, dtype: torch.dtype) -> int:
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, hidden, dtype=dtype).requires_grad_()
    return saved_bytes(module, x, list(module.parameters()))


@pytest.mark.parametrize("hidden", [64, 128, 256])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(torch.bfloat16, id="bf16 base, float32 adapters"),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_mixlora_keeps_less_than_half_of_lora(
    monkeypatch: pytest.MonkeyPatch, hidden, dtype, stage
) -> None:
    form = replace(KERNELS["exact"], run=partial(run_stage, stage))
    monkeypatch.setitem(KERNELS, "exact", form)
    mixlora, lora = make_mixlora(hidden, dtype), make_lora(hidden, dtype)
    for module in (mixlora, lora):
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    ratio = of_module(mixlora, hidden, dtype) / of_module(lora, hidden, dtype)
    assert ratio <= BAR


def test_the_count_sees_what_peft_keeps() -> None:
    """Of a float32 LoRA without dropout, per projection: its input and A x; then the outputs of
    gate and up, silu of the gate, and the hidden state, which is down's input."""
    module = make_lora(64, torch.float32, lora_dropout=0.0)
    hidden, inner = 64, 172
    # Autograd keeps: x, three A x, gate, silu(gate), up, silu(gate) * up.
    floats = TOKENS * (hidden + 3 * 80 + 3 * inner + inner)
    assert of_module(module, 64, torch.float32) == 4 * floats


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("p", [0.0, 0.05], ids=["no dropout", "dropout"])
def test_what_mixlora_keeps_does_not_grow_with_k(stage, p) -> None:
    """But for the routing itself: experts and weights, K numbers per token each."""
    found = []
    for top_k in (1, 2, 4):
        module = make_mixlora(64, torch.float32, top_k=top_k, lora_dropout=p)
        torch.manual_seed(1)
        x = torch.randn(TOKENS, 64, requires_grad=True)
        module(x)
        routing = module.routing
        torch.manual_seed(2)
        block = module.block("default", TOKENS, torch.float32)
        left_out = [*module.parameters(), routing.experts, routing.weights]
        found.append(
            saved_bytes(lambda x, r=routing, b=block: run_stage(stage, x, r, b), x, left_out)
        )
    assert found[0] == found[1] == found[2] >= 4 * TOKENS * (64 + 2 * 172)


def test_mixdora_keeps_its_outputs_too() -> None:
    """Per slot the down projection's output before its scale; beside it that scale and norms."""
    plain = of_module(make_mixlora(64, torch.float32, lora_dropout=0.0), 64, torch.float32)
    dora = make_mixlora(64, torch.float32, lora_dropout=0.0, use_dora=True)
    norms = 4 * 8 * (2 * 172 + 64)
    slots = 4 * TOKENS * 2 * 64
    scale = 4 * 8 * 64
    assert of_module(dora, 64, torch.float32) == plain + norms + slots + scale


@pytest.mark.parametrize(
    ("dora", "share"), [pytest.param(False, 0.85, id="LoRA"), pytest.param(True, 0.65, id="DoRA")]
)
def test_fused_linear_keeps_less_than_peft(dora, share) -> None:
    """No dropped copy of the input and, for DoRA, no matrix of the weight's shape."""
    module = make_lora(64, torch.float32, use_dora=dora)
    stock = of_module(module, 64, torch.float32)
    set_kernel(module, "exact")
    assert of_module(module, 64, torch.float32) < share * stock
