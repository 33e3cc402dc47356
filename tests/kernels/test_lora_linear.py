"""LoRA and DoRA of one layer, fused: against the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels import DropMask, draw_mask
from mixlora_exp.kernels.lora.linear import lora_linear, lora_linear_reference

SCALING = 1.7
NAMES = ("x", "a", "b", "magnitude")


def draw(tokens: int, size: tuple[int, int], rank: int, dora: bool) -> dict[str, Tensor]:
    """Values in float64, an upstream gradient among them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inner, outer = size
    values = {
        "x": normal(tokens, inner),
        "weight": normal(outer, inner) / inner**0.5,
        "a": normal(rank, inner) / inner**0.5,
        "b": normal(outer, rank) / rank**0.5,
        "upstream": normal(tokens, outer),
    }
    if dora:
        values["norm"] = (values["weight"] + SCALING * values["b"] @ values["a"]).norm(dim=-1)
        values["magnitude"] = values["norm"] * (1 + 0.3 * normal(outer))
    return values


def run(
    compute: Callable,
    values: dict[str, Tensor],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    mask: DropMask | None,
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    base = ("x", "weight", "upstream")
    cast = {n: v.to(dtype if n in base else adapter_dtype, copy=True) for n, v in values.items()}
    leaves = {name: cast[name].requires_grad_() for name in NAMES if name in cast}
    y = compute(
        cast["x"],
        cast["weight"],
        cast["a"],
        cast["b"],
        SCALING,
        magnitude=cast.get("magnitude"),
        norm=cast.get("norm"),
        mask=mask,
    )
    assert y.dtype == dtype
    y.backward(cast["upstream"])
    found = {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    assert all(found[name].dtype == leaf.dtype for name, leaf in leaves.items())
    return {name: value.double() for name, value in found.items()}


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def dora(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize(
    ("tokens", "size", "rank"),
    [
        pytest.param(9, (12, 20), 2, id="wider out than in"),
        pytest.param(9, (20, 12), 10, id="rank 10"),
        pytest.param(5, (7, 13), 32, id="rank above both sizes"),
        pytest.param(1, (12, 20), 2, id="one token"),
        pytest.param(0, (12, 20), 2, id="no token"),
    ],
)
@pytest.mark.parametrize("held", ["no mask", "sparse", "bool", "p > 0.5"])
def test_equals_the_definition(fresh_seed, tokens, size, rank, dora, held) -> None:
    values = draw(tokens, size, rank, dora)
    p = {"no mask": 0.0, "p > 0.5": 0.7}.get(held, 0.4)
    mask = draw_mask((tokens, size[0]), p, torch.device("cpu"))
    if held == "bool":
        mask = DropMask(mask.kept(), mask.scale, mask.shape)
    dtypes = torch.float64, torch.float64
    found = run(lora_linear, values, *dtypes, mask)
    truth = run(lora_linear_reference, values, *dtypes, mask)
    assert found.keys() == truth.keys() == {"y", *NAMES[: 3 + dora]}
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-10)


def test_definition_in_whole_matrices(fresh_seed, dora) -> None:
    """`m / ||W + s B A|| (W x + s B A drop(x))`: the reference is nothing else."""
    values = draw(9, (12, 20), 3, dora)
    mask = draw_mask((9, 12), 0.4, torch.device("cpu"))
    y = run(lora_linear_reference, values, torch.float64, torch.float64, mask)["y"]
    delta = SCALING * values["b"] @ values["a"]
    dropped = values["x"] * mask.kept() * mask.scale
    expected = values["x"] @ values["weight"].T + dropped @ delta.T
    if dora:
        expected = expected * values["magnitude"] / (values["weight"] + delta).norm(dim=-1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, id="bf16 base, float32 adapter, as trained"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16 throughout"),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_is_as_precise_as_the_definition(dtype, adapter_dtype, dora, p) -> None:
    """Its error is at most twice the definition's in the same precision, in the mean."""
    errors: dict[str, list[Tensor]] = {}
    for seed in range(5):
        torch.manual_seed(seed)
        values = draw(40, (24, 36), 10, dora)
        for name, value in values.items():
            kind = dtype if name in ("x", "weight", "upstream") else adapter_dtype
            values[name] = value.to(kind).double()
        mask = draw_mask((40, 24), p, torch.device("cpu"))
        truth = run(lora_linear_reference, values, torch.float64, torch.float64, mask)
        made = [
            run(compute, values, dtype, adapter_dtype, mask)
            for compute in (lora_linear, lora_linear_reference)
        ]
        for name, exact in truth.items():
            pair = [(results[name] - exact).norm() / exact.norm() for results in made]
            errors.setdefault(name, []).append(torch.stack(pair))
    floor = torch.finfo(dtype).eps / 2
    for name, pairs in errors.items():
        error, allowed = torch.stack(pairs).mean(dim=0).tolist()
        assert error <= 2 * allowed + floor, (name, error, allowed)


def test_input_that_needs_no_gradient(fresh_seed, dora) -> None:
    """As in the first layer: the adapters' gradients are the same."""
    values = draw(9, (12, 20), 3, dora)
    whole = run(lora_linear, values, torch.float64, torch.float64, None)
    leaves = {name: values[name].clone().requires_grad_() for name in NAMES[1:] if name in values}
    y = lora_linear(
        values["x"],
        values["weight"],
        leaves["a"],
        leaves["b"],
        SCALING,
        magnitude=leaves.get("magnitude"),
        norm=values.get("norm"),
    )
    y.backward(values["upstream"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-12, atol=1e-12)
