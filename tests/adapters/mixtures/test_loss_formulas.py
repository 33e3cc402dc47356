"""Losses of LoRAMoE and GOAT against their formulas, token by token, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixlora_exp.kernels import make_mixture, make_router

SEQUENCES, TOKENS, WIDTH, EXPERTS, LAYERS = 3, 4, 5, 4, 2
TYPES = [1, 0, 1]
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
D = 0.3


def loramoe(p: Tensor) -> Tensor:
    """var(c u) / (mean(c u)^2 + 1e-10) of p (rows, E), with u summed over real tokens."""
    scaled = []
    for sequence, kind in enumerate(TYPES):
        for expert in range(EXPERTS):
            rows = [sequence * TOKENS + t for t in range(TOKENS) if MASK[sequence, t]]
            marked = (expert < EXPERTS // 2) == (kind == 1)
            scaled.append((1 + D if marked else 1 - D) * sum(p[row, expert] for row in rows))
    mean = sum(scaled) / len(scaled)
    variance = sum((s - mean) ** 2 for s in scaled) / (len(scaled) - 1)
    return variance / (mean**2 + 1e-10)


def goat(p: Tensor) -> Tensor:
    """E sum_e F_e P_e of p (rows, E), where F_e is the share of real tokens with e in their top
    2."""
    real = [row for row in range(SEQUENCES * TOKENS) if MASK.flatten()[row]]
    total = 0
    for expert in range(EXPERTS):
        chosen = sum(expert in p[row].detach().argsort(descending=True)[:2] for row in real)
        total = total + chosen / len(real) * sum(p[row, expert] for row in real) / len(real)
    return EXPERTS * total


def check(
    name: str, router: str, options: dict, loss: str, formula: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    shape = {"dtype": torch.float64, "requires_grad": True}
    weights = [torch.randn(EXPERTS, WIDTH, **shape) for _ in range(LAYERS)]
    rows = [torch.randn(SEQUENCES * TOKENS, WIDTH, **shape) for _ in range(LAYERS)]
    mixture = make_mixture(name, options)
    own = make_router(router, {"num_experts": EXPERTS, "top_k": 2, "router_loss": loss}, {})
    types, mask, each = torch.tensor(TYPES), MASK.flatten(), []
    for x, weight in zip(rows, weights, strict=True):
        routing = own.route_masked(x, {"": weight}, mask, training=True)
        each.append(mixture.statistics(own, routing, mask, types))
    found = mixture.auxiliary_loss(own, own.gathered(each))
    pairs = zip(rows, weights, strict=True)
    expected = sum(formula((x @ weight.T).softmax(1)) for x, weight in pairs) / LAYERS
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    compare(*(torch.autograd.grad(value, [*weights, *rows]) for value in (found, expected)))


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_balance_loss_of_loramoe() -> None:
    check("loramoe", "dense", {"d": D}, "argmax", loramoe)


def test_load_balance_of_goat_counts_all_chosen_experts() -> None:
    check("goat", "top_k", {}, "topk", goat)
