"""Row norms of DoRA without the product B A."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels import dora, dora_norms, squared_row_norms


def norms_of_one(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """(E, out). a: (E, R, in); b: (E, out, R)."""
    return dora_norms([weight], squared_row_norms(weight)[None], a[None], b[None], scaling)[0]


def true_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (weight.double() + scaling * b.double() @ a.double()).norm(dim=-1)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form with exact products of bf16 numbers, which a CPU makes in float32."""

    def multiply(weight: Tensor, columns: Tensor, out: Tensor) -> None:
        assert weight.dtype == columns.dtype == torch.bfloat16
        torch.mm(weight.float(), columns.float().T, out=out)

    monkeypatch.setattr(dora, "EXACT", ("cpu",))
    monkeypatch.setattr(dora, "_multiply", multiply)


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
@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(2**22, id="W at once"),
        pytest.param(200, id="five rows of W at a time, the last ones three"),
        pytest.param(1, id="a row at a time, longer than a chunk"),
    ],
)
def test_norms_are_those_of_the_materialised_weight(
    monkeypatch, dtype, adapter_dtype, tolerance, experts, rank, size, chunk
) -> None:
    monkeypatch.setattr("mixlora_exp.kernels.dora.CHUNK_ELEMENTS", chunk)
    weight = torch.randn(23, 37).to(dtype)
    a = torch.randn(experts, rank, 37).to(adapter_dtype)
    b = (torch.randn(experts, 23, rank) * size).to(adapter_dtype)
    norms = norms_of_one(weight, a, b, 1.5)
    assert norms.shape == (experts, 23)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    truth = true_norms(weight, a, b, 1.5)
    torch.testing.assert_close(norms.double(), truth, rtol=tolerance, atol=0)


@pytest.mark.parametrize("form", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "size", [0.0, 1e-8, 1e-4, 1e-2, 1.0, 1e4], ids=lambda size: f"B A {size:g} of W"
)
def test_norms_of_a_large_models_rows(request, form, size) -> None:
    """4096 columns of LLaMA's size, in bf16; experts of rank 16."""
    if form == "gpu":
        request.getfixturevalue("as_on_a_gpu")
    weight = (0.02 * torch.randn(48, 4096)).bfloat16()
    a = (torch.rand(8, 16, 4096) - 0.5) / 32
    b = torch.randn(8, 48, 16)
    b *= size * weight.float().norm() / (2 * (b @ a).norm(dim=(1, 2), keepdim=True))
    norms, truth = norms_of_one(weight, a, b, 2.0), true_norms(weight, a, b, 2.0)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-6, atol=0)


def test_three_bf16_numbers_hold_a_float32() -> None:
    """But for what is smaller than the smallest bf16 number."""
    values = torch.randn(3, 5, 200) * torch.logspace(-30, 38, 200)
    parts = dora.bf16_parts(values)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), values.double())


def test_projections_of_one_shape_go_through_together(as_on_a_gpu) -> None:
    weights = [torch.randn(7, 12).bfloat16() for _ in range(3)]
    a, b = torch.randn(3, 2, 4, 12), torch.randn(3, 2, 7, 4)
    squares = torch.stack([squared_row_norms(weight) for weight in weights])
    together = dora_norms(weights, squares, a, b, 0.5)
    for weight, own_a, own_b, norms in zip(weights, a, b, together, strict=True):
        torch.testing.assert_close(norms, norms_of_one(weight, own_a, own_b, 0.5))


def test_norms_ignore_autocast() -> None:
    arguments = torch.randn(9, 7), torch.randn(2, 3, 7), torch.randn(2, 9, 3), 2.0
    with torch.autocast("cpu", torch.bfloat16):
        inside = norms_of_one(*arguments)
    assert torch.equal(inside, norms_of_one(*arguments))


def test_norm_is_a_constant_and_never_nan() -> None:
    """No gradient flows through it (DoRA, Section 4.3); rounding must not reach a square root."""
    weight = torch.randn(6, 4)
    a = torch.eye(4).unsqueeze(0).requires_grad_()
    b = -weight.clone().unsqueeze(0).requires_grad_()  # W + B A = 0
    norms = norms_of_one(weight, a, b, 1.0)
    assert not norms.requires_grad
    assert not norms.isnan().any()
    assert norms.abs().max() < 1e-2
