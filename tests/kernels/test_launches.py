"""Launches of a decoder layer in training on a GPU, counted without one: all operators of torch and
all Triton kernels of a layer, forward and backward, are dispatched as there; kernels do nothing.

What a model of two layers takes beyond one of one layer, under autocast, with the adapter's weights
of the optimizer step at hand, beyond what the frozen layer with its input gradient takes by itself.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from card_layers import run_as_on_a_card, small_llama, with_adapter
from torch import Tensor
from transformers.models.llama import modeling_llama

from mixlora_exp.bench.baselines import patch_with_liger
from mixlora_exp.bench.launches import LaunchCounter
from mixlora_exp.config.choices import Head
from mixlora_exp.kernels import DropoutStream, lora
from mixlora_exp.training.head import loss_from_hidden

pytest.importorskip("triton", reason="Triton is not installed")

TOKENS = (2, 16)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """The kernels as on a GPU; what they launch goes into the last counter of this list."""
    found: list[Counter[str]] = []

    def start(kernel: Any, grid: Any, *arguments: Any, **named: Any) -> None:
        if found:
            found[-1][f"triton:{kernel.fn.__name__}"] += 1

    def product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
        # On a GPU one product with a result in float32.
        if found:
            found[-1]["mm"] += 1
        return torch.empty(one.shape[0], other.shape[1], dtype=dtype)

    run_as_on_a_card(monkeypatch, start)
    monkeypatch.setattr(lora, "_product", product)
    return found


def pass_of(
    method: str, layers: int, counted: list[Counter[str]], liger: bool = False
) -> Counter[str]:
    """Of the second micro-batch of a run's first step: the first has what a step needs once."""
    base, stream = small_llama(layers), DropoutStream(1)
    if liger:
        patch_with_liger(base)
    model = with_adapter(base, method, stream)
    ids = torch.randint(0, 60, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    positions = torch.arange(TOKENS[0] * TOKENS[1])
    for number in range(2):
        stream.begin(number, positions // TOKENS[1], positions % TOKENS[1])
        for parameter in model.parameters():
            parameter.grad = None
        # liger-kernel's own kernels do nothing either.
        counter = LaunchCounter(lambda name, arguments: None)
        counted.append(counter.launches)
        with counter, torch.autocast("cpu", torch.bfloat16), loss_from_hidden(base, Head.chunked):
            loss = model(
                input_ids=ids, attention_mask=mask, labels=labels,
                num_items_in_batch=torch.tensor(29),
            ).loss  # fmt: skip
        with counter:
            loss.backward()
    return counted.pop()


def layer_of(method: str, counted: list[Counter[str]], liger: bool = False) -> Counter[str]:
    found: Counter[str] = Counter()
    for layers, add in ((2, found.update), (1, found.subtract)):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
                # What liger-kernel puts in their place is taken out again.
                patch.setattr(modeling_llama, name, getattr(modeling_llama, name))
            add(pass_of(method, layers, counted, liger))
    return Counter({name: count for name, count in found.items() if count})


def test_the_frozen_layer(counted) -> None:
    """What the figures are beyond: the number that is compared with."""
    assert layer_of("frozen", counted).total() == 101


@pytest.mark.parametrize(
    ("method", "budget"), [("lora", 30), ("dora", 30), ("mixlora", 24), ("mixdora", 24)]
)
def test_budget(counted, method, budget) -> None:
    frozen, found = layer_of("frozen", counted), layer_of(method, counted)
    more = Counter(found)
    more.subtract(frozen)
    seen = {name: count for name, count in sorted(more.items()) if count}
    assert found.total() - frozen.total() <= budget, seen
    assert any(name.startswith("triton:") for name in found)


@pytest.mark.parametrize(
    ("method", "budget"),
    [("frozen", 34), ("lora", 64), ("dora", 64), ("mixlora", 61), ("mixdora", 61)],
)
def test_a_whole_layer_with_norms_and_rope_of_liger(counted, method, budget) -> None:
    """The frozen layer's own launches included; its SwiGLU is liger-kernel's too."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    found = layer_of(method, counted, liger=True)
    assert found["triton:_rms_norm_forward_kernel"] == 2
    assert found["triton:_triton_rope"] == 2
    assert found.total() <= budget, dict(sorted(found.items()))
