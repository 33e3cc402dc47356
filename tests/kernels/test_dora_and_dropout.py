"""Row norms of DoRA without the product B A, and the dropout of the low-rank branches."""

from __future__ import annotations

import pytest
import torch

from mixlora_exp.kernels import dora_norms, squared_row_norms
from mixlora_exp.kernels.dropout import dropout


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [
        pytest.param(torch.float64, torch.float64, 1e-12, id="float64"),
        pytest.param(torch.float32, torch.float32, 1e-6, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, 1e-6, id="bf16 weight, float32 adapter"),
        pytest.param(torch.bfloat16, torch.bfloat16, 1e-6, id="bf16: squares must not be bf16"),
    ],
)
@pytest.mark.parametrize(
    ("experts", "rank", "size"),
    [
        pytest.param(1, 1, 1.0, id="plain DoRA of rank 1"),
        pytest.param(5, 10, 1.0, id="B A as large as W"),
        pytest.param(3, 2, 1e-3, id="B A tiny beside W, as at the start of training"),
        pytest.param(3, 2, 0.0, id="B zero: the norm of W"),
    ],
)
def test_norms_are_those_of_the_materialised_weight(
    dtype, adapter_dtype, tolerance, experts, rank, size
) -> None:
    weight = torch.randn(23, 37).to(dtype)
    a = torch.randn(experts, rank, 37).to(adapter_dtype)
    b = (torch.randn(experts, 23, rank) * size).to(adapter_dtype)
    norms = dora_norms(weight, squared_row_norms(weight), a, b, 1.5)
    truth = (weight.double() + 1.5 * b.double() @ a.double()).norm(dim=-1)
    assert norms.shape == (experts, 23)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norms.double(), truth, rtol=tolerance, atol=0)


def test_norms_ignore_autocast() -> None:
    weight, a, b = torch.randn(9, 7), torch.randn(2, 3, 7), torch.randn(2, 9, 3)
    arguments = weight, squared_row_norms(weight), a, b, 2.0
    with torch.autocast("cpu", torch.bfloat16):
        inside = dora_norms(*arguments)
    assert torch.equal(inside, dora_norms(*arguments))


def test_norm_is_a_constant_and_never_nan() -> None:
    """No gradient flows through it (DoRA, Section 4.3); rounding must not reach a square root."""
    weight = torch.randn(6, 4)
    a = torch.eye(4).unsqueeze(0).requires_grad_()
    b = -weight.clone().unsqueeze(0).requires_grad_()  # W + B A = 0
    norms = dora_norms(weight, squared_row_norms(weight), a, b, 1.0)
    assert not norms.requires_grad
    assert not norms.isnan().any()
    assert norms.abs().max() < 1e-2


def test_no_dropout_is_the_identity() -> None:
    x = torch.randn(5, 7)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_rate_scale_and_mean(p, dtype) -> None:
    torch.manual_seed(0)
    dropped = dropout(torch.ones(200_000, dtype=dtype), p)
    assert dropped.dtype == dtype
    kept = dropped != 0
    # Five standard deviations of the number kept.
    tolerance = 5 * (p * (1 - p) / 200_000) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=tolerance)
    scale = dropped[kept].double()
    assert scale.min() == scale.max()
    rounding = torch.finfo(dtype).eps + 2**-15 / (1 - p)
    assert scale[0].item() == pytest.approx(1 / (1 - p), rel=rounding)
    assert dropped.double().mean().item() == pytest.approx(1, abs=tolerance / (1 - p) + rounding)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1,), id="one element, a quarter of a draw"),
        pytest.param((3, 5, 7), id="no multiple of the four elements of a draw"),
        pytest.param((4, 4), id="a multiple of it"),
        pytest.param((0, 4), id="no element"),
    ],
)
def test_dropout_of_any_shape(shape) -> None:
    assert dropout(torch.randn(shape), 0.3).shape == shape


def test_dropout_of_a_strided_tensor() -> None:
    x = torch.randn(6, 8).T
    dropped = dropout(x, 0.5)
    assert torch.equal(dropped, torch.where(dropped != 0, x * 2, 0.0))


def test_dropout_follows_the_seed_and_changes_from_call_to_call() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert torch.equal(dropout(x, 0.5), second)
    assert not torch.equal(first, second)
    # Independent: they agree on half of the elements, not on all or none.
    assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_dropout_draws_all_four_quarters_evenly() -> None:
    """Each 64-bit draw is cut in four; the sign bit belongs to one of them."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(50_000, 4), 0.3) != 0).double()
    for quarter in kept.mean(dim=0).tolist():
        assert quarter == pytest.approx(0.7, abs=0.012)
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() < 0.03


def test_dropout_gradient_is_the_mask() -> None:
    x = torch.randn(32, 8, requires_grad=True)
    dropped = dropout(x, 0.25)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), dropped.detach())
