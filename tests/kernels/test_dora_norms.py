"""Row norms of DoRA without the product B A."""

from __future__ import annotations

import pytest
import torch

from mixlora_exp.kernels import dora_norms, squared_row_norms


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
