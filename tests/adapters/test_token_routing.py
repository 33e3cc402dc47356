"""Reading which expert took which token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mixlora_exp.adapters import MixLoraConfig, MixLoraFeedForward, MixtureConfig, routing_of
from mixlora_exp.errors import UserError


def test_experts_and_weights_are_the_router_s_by_definition(
    model_of: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    """From each block's input and the router's weight: the two largest logits, their softmax."""
    model, inputs = model_of(top_k=2, lora_dropout=0.5).train(), []
    blocks = [m for m in model.modules() if isinstance(m, MixLoraFeedForward)]
    for block in blocks:
        block.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    found = routing_of(model, batch)
    assert model.training
    real = batch["attention_mask"].bool()
    assert not real.all()
    assert len(found.layers) == len(blocks) == len(inputs)
    for number, (block, x) in enumerate(zip(blocks, inputs, strict=True)):
        (weight,) = (p for n, p in block.named_parameters() if "lora_router" in n)
        values, experts = (x.float() @ weight.T).topk(2)
        assert torch.equal(found.experts[number][real], experts[real])
        assert torch.allclose(found.weights[number][real], values.softmax(-1)[real])
        assert (found.experts[number][~real] == -1).all()
        assert not found.weights[number][~real].any()


def test_load_is_that_of_the_report(model_of: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = model_of(top_k=2)
    load = routing_of(model, batch).load()
    counts = model.base_model.router_report.counts
    assert torch.allclose(load, counts / counts.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "config",
    [
        MixLoraConfig(r=4, num_experts=4, router="top_p", router_options={"p": 0.3}),
        MixtureConfig(r=4, mixture="hydralora", target_modules=["down_proj"]),
    ],
    ids=["top_p", "hydralora"],
)
def test_routers_with_empty_slots_and_mixtures_in_single_projections(
    config: Any, base_of: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    found = routing_of(get_peft_model(base_of(), config), batch)
    empty = found.experts == -1
    assert torch.equal(empty, found.weights == 0)
    assert not empty[:, batch["attention_mask"].bool()].all(dim=-1).any()
    assert torch.allclose(found.load().sum(dim=1), torch.ones(len(found.layers)))


def test_an_adapter_without_routers_is_refused(
    base_of: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    model = get_peft_model(base_of(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="needs one active adapter with routers"):
        routing_of(model, batch)
