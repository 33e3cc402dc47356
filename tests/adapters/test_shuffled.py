"""The control that permutes experts at scoring."""

from __future__ import annotations

import pytest
import torch
from composed import compose
from torch import Tensor, nn

from mixlora_exp.adapters import attach_adapter, attach_together
from mixlora_exp.adapters.shuffled import shuffle_experts
from mixlora_exp.config.schema import Config
from mixlora_exp.kernels import MIXTURES
from mixlora_exp.models import load_model

METHODS = ["mixlora", "mixdora", *(name for name, one in MIXTURES.items() if one.router),
           "mixlora_switch", "mixlora_top_p", "mixlora_dense"]  # fmt: skip


def settings(method: str) -> Config:
    experts = "num_experts=2" if method == "goat" else "num_experts=4"
    return compose(["model=tiny", f"method={method}", f"method.{experts}", "kernel=exact"])


def built(method: str, *, identical: bool) -> nn.Module:
    """With drawn weights; `identical`: those of all experts of a module are one's."""
    config = settings(method)
    model = attach_adapter(load_model(config.model, torch.float64), config.method, config.kernel, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.double().modules():
            for part in getattr(module, "expert_parts", ()):
                for weight in getattr(module, part, {}).values():
                    weight += 0.1 * torch.randn(weight.shape, generator=generator)
                    if identical:
                        weight.copy_(weight[:1].expand_as(weight))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 900, (2, 12), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids).logits


def routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "routings", None)]


@pytest.mark.parametrize("method", METHODS)
def test_identical_experts_can_be_shuffled(method: str) -> None:
    model = built(method, identical=True)
    before = logits(model)
    shuffle_experts(model, "default", 5)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_token_gets_other_experts_and_the_same_weights(method: str) -> None:
    model = built(method, identical=False)
    before, routings = logits(model), [m.routing for m in routers(model)]
    shuffle_experts(model, "default", 5)
    assert (logits(model) - before).abs().max() > 1e-3
    first, found = routings[0], routers(model)[0].routing
    filled = first.filled
    assert torch.equal(found.weights, first.weights)
    assert not (found.experts == first.experts)[filled].any()
    again = built(method, identical=False)
    shuffle_experts(again, "default", 5)
    assert torch.equal(logits(again), logits(model)), "the seed alone decides"
    other = built(method, identical=False)
    shuffle_experts(other, "default", 6)
    # Of two experts there is one cycle.
    assert torch.equal(logits(other), logits(model)) is (method == "goat")


def test_one_expert_stays() -> None:
    config = compose(["model=tiny", "method=mixlora_one_expert"])
    model = attach_adapter(load_model(config.model, torch.float32), config.method, config.kernel, 0)
    before = logits(model.eval())
    shuffle_experts(model, "default", 5)
    assert torch.equal(logits(model), before)


def test_other_adapters_keep_theirs() -> None:
    config = settings("mixlora")
    methods = {"a": (config.method, 0), "b": (config.method, 0)}
    model = attach_together(load_model(config.model, torch.float32), methods, config.kernel)
    blocks = [module for module in model.modules() if hasattr(module, "expert_parts")]
    kept = [block.router["b"] for block in blocks]
    shuffle_experts(model, "a", 5)
    assert [block.router["b"] for block in blocks] == kept
    assert not any(block.router["a"] in kept for block in blocks)
