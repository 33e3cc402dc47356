"""Equal router logits: the lowest expert comes first, in every form of the router."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, triton_router

from mixlora_exp.kernels import Routing, route

FORMS = {
    "eager": route,
    "compiled": lambda *args: torch.compile(route, backend="aot_eager", fullgraph=True)(*args),
    "Triton": triton_router.route_triton,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (8, 2), (9, 3), (33, 5)])
def test_the_lowest_expert_comes_first(
    fresh_seed, form: Callable[..., Routing], dtype, experts, top_k
) -> None:
    """Among few whole numbers, whose sums are exact in every form, many are equal."""
    x = torch.randint(-1, 2, (40, 6))
    x[0] = 0  # Of two experts few seeds have no equal logits.
    router = torch.randint(-1, 2, (experts, 6))
    logits = (x @ router.T).tolist()
    wanted = [sorted(range(experts), key=lambda e: -row[e])[:top_k] for row in logits]
    found = form(x.to(DEVICE, dtype), router.to(DEVICE, torch.float32), top_k)
    assert found.experts.tolist() == wanted
    assert any(len(set(row)) < experts for row in logits)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_logit_decides_where_probabilities_are_equal(form: Callable[..., Routing]) -> None:
    """Beside one that is far above, two that differ have the probability 0."""
    x = torch.ones(1, 1, device=DEVICE)
    router = torch.tensor([[0.0], [200.0], [1.0], [0.5]], device=DEVICE)
    found = form(x, router, 3)
    assert found.experts.tolist() == [[1, 2, 3]]
    assert found.probabilities[0, [0, 2, 3]].count_nonzero() == 0


def test_all_forms_have_the_same_gradient(fresh_seed) -> None:
    x = torch.randint(-1, 2, (20, 6), device=DEVICE).float()
    router = torch.randint(-1, 2, (8, 6), device=DEVICE).float()
    found: list[Tensor] = []
    for form in FORMS.values():
        leaf = router.clone().requires_grad_()
        weights = form(x, leaf, 2).weights
        found.append(torch.autograd.grad(torch.cos(weights).sum(), leaf)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)
