"""The Triton kernels where numbers are none: what a buffer or a token holds stays its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_cases import (
    fused,
)

from mixlora_exp.kernels import Routing, route


def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on fresh buffers hold NaN, or an integer that no index has; counts them."""
    made: list[int] = []
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def make(*args, real: Callable = real, **kwargs) -> Tensor:
            buffer = real(*args, **kwargs)
            made.append(buffer.numel())
            integer = not buffer.is_floating_point()
            return buffer.fill_(torch.iinfo(buffer.dtype).max if integer else float("nan"))

        monkeypatch.setattr(torch, name, make)
    return made


@pytest.mark.parametrize(
    "dora",
    [pytest.param(False, id="LoRA", marks=pytest.mark.slow), pytest.param(True, id="DoRA")],
)
def test_same_bits_each_time_whatever_buffers_hold(
    block_of, plain, monkeypatch, fresh_seed, dora
) -> None:
    case = replace(plain, tokens=19, inner=33, experts=5, top_k=3, dora=dora)
    block = block_of(case, fresh_seed, torch.float32)
    masks = block.masks(0.3, hashed=True)
    first = block.run(fused, torch.float32, masks=masks)
    made = poison(monkeypatch)
    second = block.run(fused, torch.float32, masks=masks)
    assert len(made) >= 5
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def broken_run(block, experts: Tensor, upstream: Tensor | None = None, **changed: Tensor):
    """`fused` with some values changed and the routing kept, as (y, gradients by name)."""
    leaves = {
        name: changed.get(name, value).to(torch.float32, copy=True).requires_grad_()
        for name, value in block.values.items()
    }
    probabilities = route(block.values["x"], block.values["router"], block.case.top_k)
    weights = probabilities.weights.float()
    routing = Routing(probabilities.logits, probabilities.probabilities, experts, weights)
    y = fused(leaves["x"], routing, block.block(leaves, torch.float32, torch.float32))
    y.backward((block.upstream if upstream is None else upstream).float())
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items() if name != "router"}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=["NaN", "infinity"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_nan_token_leaves_the_others_alone(block_of, plain, dora, broken) -> None:
    """A padding row may hold NaN. The token itself must not look sound."""
    block = block_of(replace(plain, dora=dora), 0, torch.float32)
    experts = route(block.values["x"], block.values["router"], 2).experts
    x = block.values["x"].clone()
    x[3] = broken
    others = torch.arange(len(x)) != 3
    sound, sound_gradients = broken_run(block, experts)
    found, gradients = broken_run(block, experts, x=x)
    torch.testing.assert_close(found[others], sound[others])
    torch.testing.assert_close(gradients["x"][others], sound_gradients["x"][others])
    assert found[3].isnan().all()
