"""Fresh buffers hold whatever was in memory: results must not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from one_lora import among_several, by_itself
from torch import Tensor

from mixlora_exp.kernels import draw_mask
from mixlora_exp.kernels.low_rank import LowRankPart


def poison(buffer: Tensor) -> Tensor:
    """NaN, or for integers a number that no index has."""
    if buffer.is_floating_point():
        return buffer.fill_(float("nan"))
    if buffer.dtype == torch.bool:
        return buffer.fill_(True)
    return buffer.fill_(torch.iinfo(buffer.dtype).max)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """While in use, Python's ways to an uninitialised tensor give a poisoned one; lists them."""
    used: list[str] = []
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        real = getattr(owner, name)

        def make(*args, real: Callable = real, name: str = name, **kwargs) -> Tensor:
            used.append(name)
            return poison(real(*args, **kwargs))

        monkeypatch.setattr(owner, name, make)
    assert torch.empty(2).isnan().all()
    assert torch.ones(2).new_empty(2).isnan().all()
    used.clear()
    return used


CASES = [
    pytest.param({}, id="LoRA"),
    pytest.param({"dora": True}, id="DoRA"),
    pytest.param({"top_k": 1}, id="K=1"),
    pytest.param({"roles": ("gate",)}, id="experts on gate only"),
    pytest.param({"roles": ("down",)}, id="experts on down only"),
    pytest.param({"dora": True, "roles": ("gate", "up")}, id="DoRA without down"),
    pytest.param({"pushed": {2: -60.0}}, id="an expert without tokens"),
    pytest.param({"pushed": {2: -60.0}, "dora": True}, id="DoRA, an expert without tokens"),
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.7], ids="p={}".format)
def test_float64(
    block_of, plain, exact_forms, tiny_blocks, same, poisoned, changes, dropout
) -> None:
    """In several blocks, with masks of both forms."""
    block = block_of(replace(plain, **changes), 0)
    tiny_blocks(8)
    torch.manual_seed(0)
    masks = block.masks(dropout)
    truth = block.run("reference", torch.float64, masks=masks)
    poisoned.clear()
    same(block.run(exact_forms["exact, grouped"], torch.float64, masks=masks), truth)
    assert {"empty_like", "new_empty"} <= set(poisoned)
    same(block.run(exact_forms["exact, dense"], torch.float64, masks=masks), truth)
    same(block.run("shared", torch.float64, masks=masks), truth)


@pytest.mark.parametrize("changes", CASES)
def test_bf16_where_rows_fill_segments_up(block_of, plain, exact_forms, poisoned, changes) -> None:
    block = block_of(replace(plain, **changes), 0, torch.bfloat16)
    dtypes = torch.bfloat16, torch.float32
    truth = block.run("reference", *dtypes)
    for kernel in exact_forms.values():
        for name, result in block.run(kernel, *dtypes).items():
            if "top_k" in changes and name == "router":
                continue  # rounding, no more
            assert (result - truth[name]).norm() <= 0.03 * truth[name].norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids="p={}".format)
@pytest.mark.parametrize("compute", [by_itself, among_several])
def test_linear(poisoned, dropout, compute) -> None:
    x, a, b, magnitude = (
        torch.randn(shape).requires_grad_() for shape in ((9, 7), (2, 7), (5, 2), (5,))
    )
    mask = draw_mask((9, 7), dropout, torch.device("cpu"))
    norm = torch.rand(5) + 1
    y = compute(x, torch.randn(5, 7), LowRankPart(a, b, 2.0, magnitude, norm, mask))
    y.sum().backward()
    for tensor in (y, x.grad, a.grad, b.grad, magnitude.grad):
        assert tensor.isfinite().all()
