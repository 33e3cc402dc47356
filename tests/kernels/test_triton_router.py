"""The fused router against `route`: compiled on a GPU, elsewhere by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, GPU, triton_router

from mixlora_exp.kernels import Routing, make_router, route

route_triton = triton_router.route_triton
FIELDS = ("logits", "probabilities", "experts", "weights")


def inputs(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(tokens, hidden, dtype=torch.float64).to(dtype)
    router = torch.randn(experts, hidden) * 0.5
    return x.to(DEVICE), router.to(DEVICE)


def fell_back(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the x of each call that is left to `route`."""
    left: list[Tensor] = []

    def spy(x: Tensor, router: Tensor, top_k: int) -> Routing:
        left.append(x)
        return route(x, router, top_k)

    monkeypatch.setattr(triton_router, "route", spy)
    return left


SHAPES = [
    pytest.param(9, 12, 4, 2, id="small"),
    pytest.param(1, 12, 4, 2, id="one token"),
    pytest.param(40, 131, 8, 2, id="several tiles of tokens and of D, neither filled up"),
    pytest.param(17, 16, 5, 3, id="E and K no powers of two"),
    pytest.param(9, 12, 3, 3, id="K=E"),
    pytest.param(9, 12, 4, 1, id="K=1"),
    pytest.param(9, 12, 1, 1, id="one expert"),
    pytest.param(9, 12, 64, 8, id="64 experts"),
]


@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(
    monkeypatch, fresh_seed, tokens, hidden, experts, top_k, dtype
) -> None:
    """As `route` in float64, with an upstream gradient on each of the outputs."""
    left = fell_back(monkeypatch)
    x, router = inputs(tokens, hidden, experts, dtype)
    upstream = [torch.randn(tokens, width) for width in (experts, experts, top_k)]
    results = []
    for function, kind in ((route_triton, dtype), (route, torch.float64)):
        leaves = [x.to(kind, copy=True), router.to(torch.promote_types(kind, torch.float32))]
        for leaf in leaves:
            leaf.requires_grad_()
        routing = function(*leaves, top_k)
        made = (routing.logits, routing.probabilities, routing.weights)
        grads = torch.autograd.grad(
            made, leaves, [u.to(m) for u, m in zip(upstream, made, strict=True)]
        )
        results.append([*(getattr(routing, field) for field in FIELDS), *grads])
    assert not left
    for name, found, truth in zip([*FIELDS, "x", "router"], *results, strict=True):
        if name == "experts":
            assert torch.equal(found, truth)
            continue
        assert found.dtype == (dtype if name == "x" else torch.float32)
        # The interpreter cuts numbers off on their way to bf16, where a GPU rounds them.
        tolerance = 1e-5 if found.dtype == torch.float32 else 2**-8 if GPU else 2**-7
        error = (found.double() - truth).abs().max()
        assert error <= tolerance * truth.abs().max().clamp(min=1.0), name


@pytest.mark.parametrize("field", ["logits", "probabilities", "weights"])
def test_gradient_through_one_output_alone(fresh_seed, field) -> None:
    x, router = inputs(9, 12, 4, torch.float32)
    found = []
    for function in (route_triton, route):
        leaves = [x.clone().requires_grad_(), router.clone().requires_grad_()]
        made = getattr(function(*leaves, 2), field)
        found.append(torch.autograd.grad(made, leaves, torch.cos(made.detach())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["argmax", "topk"])
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "with padding"])
def test_the_report_that_is_counted_on_the_way(fresh_seed, loss, masked) -> None:
    """Loss, its gradient and counts of two modules, as from the routing itself."""
    top_k = make_router("top_k", {"num_experts": 5, "top_k": 2, "router_loss": loss}, {})
    mask = torch.arange(37, device=DEVICE) % 3 != 1 if masked else None
    x, _ = inputs(37, 12, 5, torch.float32)
    routers = [torch.randn(5, 12, device=DEVICE) for _ in range(2)]
    if masked:
        x[1] = float("nan")
    found = []
    for function in (lambda *args: route_triton(*args, mask), route):
        leaves = [router.clone().requires_grad_() for router in routers]
        each = [top_k.statistics(function(x, leaf, 2), mask) for leaf in leaves]
        assert ("report" in each[0]) == (function is not route)
        gathered = top_k.gathered(each)
        value = top_k.auxiliary_loss(gathered)
        grads = torch.autograd.grad(value, leaves) if not masked else []
        found.append((value.detach(), gathered["counts"], *grads))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_router_adds_its_gradient_to_that_of_the_rows_it_hands_on(fresh_seed) -> None:
    x, router = inputs(37, 12, 4, torch.float32)
    found = []
    for function in (route_triton, route):
        leaf = x.clone().requires_grad_()
        routing = function(leaf, router, 2)
        rows = leaf if routing.rows is None else routing.rows
        assert (rows is leaf) == (function is route)
        y = torch.cos(rows).sum() + torch.sin(routing.weights).sum()
        found.append(torch.autograd.grad(y, leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=["NaN", "infinity"])
@pytest.mark.parametrize("experts", [4, 5, 16])
def test_a_nan_token_gets_experts_that_exist(broken, experts) -> None:
    """A number that is no expert would be read from outside the experts' memory."""
    x, router = inputs(9, 12, experts, torch.float32)
    sound = route_triton(x, router, 3)
    hurt = x.clone()
    hurt[3] = broken
    found = route_triton(hurt, router, 3)
    others = torch.arange(9, device=DEVICE) != 3
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field)[others], getattr(sound, field)[others])
    chosen = found.experts[3].tolist()
    assert len(set(chosen)) == 3
    assert all(0 <= expert < experts for expert in chosen)
    assert found.weights[3].isnan().all()


def test_same_bits_each_time_whatever_buffers_hold(monkeypatch) -> None:
    x, router = inputs(20, 33, 5, torch.float32)
    first = route_triton(x, router, 2)
    real = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        buffer = real(*args, **kwargs)
        return buffer.fill_(float("nan") if buffer.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    second = route_triton(x, router, 2)
    for field in FIELDS:
        assert torch.equal(getattr(first, field), getattr(second, field)), field


def test_strided_input() -> None:
    x, router = inputs(9, 12, 4, torch.float32)
    found = route_triton(x.T.contiguous().T, router.T.contiguous().T, 2)
    expected = route_triton(x, router, 2)
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


@pytest.mark.parametrize(
    ("tokens", "experts", "dtype"),
    [
        pytest.param(9, 4, torch.float64, id="float64"),
        pytest.param(9, 65, torch.float32, id="65 experts"),
        pytest.param(0, 4, torch.float32, id="no tokens"),
    ],
)
def test_the_rest_is_left_to_route(monkeypatch, tokens, experts, dtype) -> None:
    left = fell_back(monkeypatch)
    x, router = inputs(tokens, 12, experts, dtype)
    routing = route_triton(x, router, 2)
    assert len(left) == 1
    assert routing.experts.shape == (tokens, 2)
    assert routing.weights.dtype == torch.promote_types(dtype, torch.float32)
