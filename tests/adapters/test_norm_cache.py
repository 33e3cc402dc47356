"""The cache of row norms by itself, and in one layer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.linear import FusedLinear
from mixlora_exp.adapters.norms import NormCache, adapter_norms

ROUNDS = 30
"""New tensors often lie where old ones lay: with the sizes below, in 53 to 60 of 60 tries."""


def test_keeps_by_key() -> None:
    cache, made = NormCache(), []
    source = torch.randn(3)

    def get(*key: str) -> Tensor:
        return cache.get(key, (source,), lambda: made.append(key) or source * 2)

    first = get("norm", "a")
    assert get("norm", "a") is first
    get("norm", "b")
    get("norm", "a")
    assert made == [("norm", "a"), ("norm", "b")]


def test_any_source_that_was_written_to() -> None:
    cache = NormCache()
    sources = torch.randn(3), torch.randn(3)
    for source in (*sources, None):
        value = cache.get(("norm", "a"), sources, lambda: sources[0] + sources[1])
        torch.testing.assert_close(value, sources[0] + sources[1])
        if source is not None:
            source.mul_(2)


def test_a_step_makes_what_is_not_frozen_anew() -> None:
    """Of any optimizer: which tensors it holds is not looked at."""
    cache, made = NormCache(), []
    source, other = torch.randn(3), nn.Parameter(torch.zeros(1))
    other.grad = torch.zeros(1)
    for _ in range(2):
        for frozen in (False, True):
            cache.get(
                ("frozen" if frozen else "norm", "a"),
                (source,),
                lambda frozen=frozen: made.append(frozen) or source * 2,
                frozen=frozen,
            )
        torch.optim.SGD([other], lr=0.0).step()
    assert made == [False, True, False]


def test_clear_forgets_what_depends_on_adapters() -> None:
    cache, made = NormCache(), []
    source = torch.randn(3)
    for _ in range(2):
        for key in (("weight", ""), ("norm", "a")):
            cache.get(key, (source,), lambda key=key: made.append(key) or source, frozen=True)
        cache.clear()
    assert made == [("weight", ""), ("norm", "a"), ("norm", "a")]


def test_values_are_constants_and_of_use_in_training() -> None:
    """Also when the first to ask was in inference mode."""
    source = nn.Parameter(torch.randn(3))
    cache = NormCache()
    with torch.inference_mode():
        value = cache.get(("norm", "a"), (source,), lambda: source * 2)
    assert not value.requires_grad
    assert not value.is_inference()
    (source * value).sum().backward()
    torch.testing.assert_close(source.grad, 2 * source.detach())


CONFIG = LoraConfig(
    r=8, lora_alpha=16, target_modules=["proj"], use_dora=True, init_lora_weights=False
)


@pytest.fixture
def layer() -> FusedLinear:
    model = nn.ModuleDict({"proj": nn.Linear(64, 176)})
    inject_adapter_in_model(CONFIG, model)
    set_kernel(model, "exact")
    return model["proj"]


def check_norm(layer: FusedLinear) -> None:
    weight, a, b = (
        part.weight for part in (layer.base_layer, layer.lora_A.default, layer.lora_B.default)
    )
    found = adapter_norms(layer.norms, ("W", "default"), weight, a, b, layer.scaling["default"])
    torch.testing.assert_close(found, (weight + 2.0 * b @ a).norm(dim=-1).detach())


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about a second adapter
def test_memory_used_again_by_an_adapter_of_a_deleted_ones_name(layer) -> None:
    for _ in range(ROUNDS):
        layer(torch.randn(3, 64))
        layer.delete_adapter("default")
        inject_adapter_in_model(CONFIG, nn.ModuleDict({"proj": layer}))
        check_norm(layer)


def test_memory_used_again_by_weights_of_another_dtype_and_back(layer) -> None:
    for _ in range(ROUNDS):
        with torch.no_grad():
            layer.lora_B.default.weight.normal_()
        layer(torch.randn(3, 64))
        layer.bfloat16().float()  # rounds
        check_norm(layer)
