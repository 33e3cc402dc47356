"""Mixtures that start from a weight's singular values, against formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels.mixture_base import Sizes, make_mixture

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def low_rank(weight: Tensor, chosen: slice) -> Tensor:
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, chosen] @ torch.diag(values[chosen]) @ v[chosen]


def test_goat_s_experts_start_from_runs_of_singular_values(weight: Tensor) -> None:
    """Two runs of five values, of which an expert takes the first three; s = sqrt(3 eta in / R)."""
    sizes = Sizes(experts=2, rank=3, inputs=10, outputs=12)
    goat = make_mixture("goat", {"eta": 2.0, "rho": 5.0})
    scaling = goat.scaling(sizes, usual=1.0)
    assert scaling == pytest.approx(math.sqrt(3 * 2.0 * 10 / 3), rel=1e-12)
    parts = goat.initial(sizes, weight, scaling)
    for expert, chosen in enumerate((slice(0, 3), slice(5, 8))):
        product = scaling * parts["B"][expert] @ parts["A"][expert]
        torch.testing.assert_close(product, low_rank(weight, chosen) / 5.0, **EXACT)


def test_pissa_starts_from_the_largest_singular_values(weight: Tensor) -> None:
    sizes = Sizes(experts=1, rank=3, inputs=10, outputs=12)
    parts = make_mixture("pissa", {}).initial(sizes, weight, 0.7)
    product = 0.7 * parts["B"][0] @ parts["A"][0]
    torch.testing.assert_close(product, low_rank(weight, slice(0, 3)), **EXACT)
    assert all(torch.equal(parts[name], parts[f"{name}0"]) for name in ("A", "B"))


@pytest.mark.parametrize(
    ("name", "weight_name", "width"),
    [("mola", "A", 25), ("moslora", "A", 25), ("moslora", "mixer", 64)],
)
def test_other_starts_are_those_of_a_linear_layer(name: str, weight_name: str, width: int) -> None:
    """Uniform in +-1/sqrt(width), to within what its extremes can miss; B is zero."""
    torch.manual_seed(0)
    experts = 1 if name == "moslora" else 4
    sizes = Sizes(experts=experts, rank=64, inputs=25, outputs=12)
    parts = make_mixture(name, {}).initial(sizes, torch.zeros(12, 25), 1.0)
    drawn, end = parts[weight_name], 1 / math.sqrt(width)
    assert -end <= drawn.min() < -0.98 * end
    assert 0.98 * end < drawn.max() <= end
    assert abs(drawn.mean()) < 6 * end / math.sqrt(3 * drawn.numel())
    assert not parts["B"].any()
