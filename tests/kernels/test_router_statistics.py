"""The router and the load-balance loss."""

from __future__ import annotations

import pytest
import torch

from mixlora_exp.kernels import make_router, route, router_fractions, router_loss


def loss_by_hand(
    layers: list[tuple[list[list[float]], list[bool]]], top_k: int, *, count_all: bool, pooled: bool
) -> float:
    """Eq. (8) and (9) in plain Python: E sum_i F_i P_i, tokens one by one."""

    def one(tokens: list[list[float]]) -> float:
        experts = len(tokens[0])
        counted, mass = [0.0] * experts, [0.0] * experts
        for row in tokens:
            ranked = sorted(range(experts), key=lambda i: -row[i])
            for expert in ranked[: top_k if count_all else 1]:
                counted[expert] += 1 / len(tokens)
            for expert in range(experts):
                mass[expert] += row[expert] / len(tokens)
        return experts * sum(f * p for f, p in zip(counted, mass, strict=True))

    real = [
        [row for row, keep in zip(rows, mask, strict=True) if keep]
        for rows, mask in layers  # fmt: skip
    ]
    if pooled:
        return one([row for rows in real for row in rows])
    return sum(one(rows) for rows in real) / len(real)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        pytest.param(torch.bfloat16, torch.float32, id="bf16 cannot tell near ties"),
        pytest.param(torch.float16, torch.float32, id="float16 likewise"),
        pytest.param(torch.float32, torch.float32, id="float32 stays"),
        pytest.param(torch.float64, torch.float64, id="float64, for checks, is not cut"),
    ],
)
def test_route_runs_in_float32_or_better(dtype, expected) -> None:
    x, router = torch.randn(5, 8).to(dtype), torch.randn(4, 8)
    routing = route(x, router, 2)
    assert {routing.logits.dtype, routing.probabilities.dtype, routing.weights.dtype} == {expected}
    truth = x.double() @ router.double().T
    torch.testing.assert_close(routing.logits.double(), truth, rtol=1e-5, atol=1e-5)


def test_route_ignores_autocast() -> None:
    x, router = torch.randn(5, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = route(x, router, 2)
    assert torch.equal(inside.logits, route(x, router, 2).logits)


@pytest.mark.parametrize(
    "top_k",
    [
        pytest.param(1, id="K=1: the weight is 1"),
        pytest.param(2, id="as in the paper"),
        pytest.param(6, id="K=E: the weights are the probabilities"),
    ],
)
def test_route_chooses_the_most_probable_and_normalises(top_k) -> None:
    routing = route(torch.randn(11, 8), torch.randn(6, 8), top_k)
    assert routing.experts.shape == routing.weights.shape == (11, top_k)
    torch.testing.assert_close(routing.weights.sum(dim=-1), torch.ones(11))
    ranked = routing.logits.argsort(dim=-1, descending=True)
    assert torch.equal(routing.experts, ranked[:, :top_k])
    chosen = routing.probabilities.gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(dim=-1, keepdim=True))
    if top_k == 1:
        assert (routing.weights == 1).all()
    if top_k == 6:
        torch.testing.assert_close(routing.weights, chosen)


def test_weights_carry_the_gradient_of_the_normalised_choice() -> None:
    x, router = torch.randn(3, 4).double(), torch.randn(5, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: route(x, r, 2).weights, router)


@pytest.mark.parametrize(
    ("count_all", "expected"),
    [
        pytest.param(False, 1.0, id="argmax: 1 at balance"),
        pytest.param(True, 2.0, id="topk: K at balance"),
    ],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_loss_at_perfect_balance(routing_of, count_all, expected, pooled) -> None:
    """Each expert is first for one token and second for one, with equal mean probability."""
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(4, 1)
    balanced = torch.stack([row.roll(i) for i, row in enumerate(probabilities)])
    fractions, mass, counts = router_fractions(routing_of(balanced, 2), None, count_all=count_all)
    assert counts.tolist() == [2, 2, 2, 2]
    loss = router_loss(fractions.repeat(3, 1), mass.repeat(3, 1), pooled=pooled)
    assert loss.item() == pytest.approx(expected)


def test_loss_is_largest_when_one_expert_has_all(routing_of) -> None:
    probabilities = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    fractions, mass, _ = router_fractions(routing_of(probabilities, 2), None, count_all=False)
    assert router_loss(fractions[None], mass[None], pooled=False).item() == pytest.approx(4.0)


@pytest.mark.parametrize("count_all", [False, True])
@pytest.mark.parametrize(
    "padding",
    [
        pytest.param(1.0, id="a padding row like any other"),
        pytest.param(float("nan"), id="a padding row of NaN, 0 * NaN is NaN"),
        pytest.param(float("inf"), id="a padding row of infinity"),
    ],
)
def test_padding_never_counts(count_all, padding) -> None:
    x, router = torch.randn(10, 8), torch.randn(4, 8)
    mask = torch.tensor([True, True, False, True, True, True, False, False, True, True])
    padded = x.clone()
    padded[~mask] = padding
    whole = router_fractions(route(x[mask], router, 2), None, count_all=count_all)
    masked = router_fractions(route(padded, router, 2), mask, count_all=count_all)
    for one, other in zip(masked, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_fractions_of_only_padding_are_zero() -> None:
    """A whole micro-batch of padding must not divide by zero."""
    routing = route(torch.randn(3, 8), torch.randn(4, 8), 2)
    for value in router_fractions(routing, torch.zeros(3, dtype=torch.bool), count_all=True):
        assert (value == 0).all()


def test_fractions_sum_to_one_and_to_k() -> None:
    routing = route(torch.randn(20, 8), torch.randn(5, 8), 3)
    first, mass, counts = router_fractions(routing, None, count_all=False)
    every, _, same = router_fractions(routing, None, count_all=True)
    assert first.sum().item() == pytest.approx(1)
    assert every.sum().item() == pytest.approx(3)
    assert mass.sum().item() == pytest.approx(1)
    assert counts.sum() == 60
    assert torch.equal(counts, same)


@pytest.mark.parametrize("count_all", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_loss_against_a_loop_by_hand(count_all, pooled) -> None:
    mask = [True, False, True, True, True, False, True]
    statistics, layers = [], []
    for _ in range(3):
        routing = route(torch.randn(7, 8).double(), torch.randn(5, 8).double(), 2)
        statistics.append(router_fractions(routing, torch.tensor(mask), count_all=count_all))
        layers.append((routing.probabilities.tolist(), mask))
    fractions, mass, _ = (torch.stack(column) for column in zip(*statistics, strict=True))
    expected = loss_by_hand(layers, 2, count_all=count_all, pooled=pooled)
    assert router_loss(fractions, mass, pooled=pooled).item() == pytest.approx(expected)


def test_pooled_equals_per_layer_when_layers_agree_and_not_otherwise() -> None:
    fractions, mass = torch.rand(2, 3, 4).softmax(dim=-1)
    assert router_loss(fractions, mass, pooled=True) != router_loss(fractions, mass, pooled=False)
    same = fractions[:1].repeat(3, 1), mass[:1].repeat(3, 1)
    torch.testing.assert_close(router_loss(*same, pooled=True), router_loss(*same, pooled=False))


def test_loss_gradient_reaches_the_router_through_the_probabilities() -> None:
    """F counts and has no gradient: d loss / d logits is that of E sum_i F_i P_i with F fixed."""
    x, router = torch.randn(9, 8).double(), torch.randn(4, 8).double().requires_grad_()
    routing = route(x, router, 2)
    fractions, mass, _ = router_fractions(routing, None, count_all=False)
    router_loss(fractions[None], mass[None], pooled=False).backward()
    again = router.detach().requires_grad_()
    fixed = fractions.detach()
    (4 * ((x @ again.T).softmax(dim=-1).mean(dim=0) * fixed).sum()).backward()
    torch.testing.assert_close(router.grad, again.grad)
    assert not fractions.requires_grad


def test_a_router_in_bf16_cannot_tell_near_ties() -> None:
    x = torch.eye(4)
    router = torch.tensor([[1.0] * 4, [1.0 + 2**-10] * 4, [0.0] * 4])
    assert route(x, router, 1).experts.flatten().tolist() == [1] * 4
    top_k = make_router("top_k", {"num_experts": 3, "top_k": 2, "router_precision": "bfloat16"}, {})
    rounded = top_k.route(x, {"": router})
    assert torch.equal(rounded.probabilities[:, 0], rounded.probabilities[:, 1])
    assert rounded.probabilities.dtype is torch.float32
    assert torch.allclose(rounded.weights.sum(-1), torch.ones(4))
    # Numbers that bf16 holds are routed alike.
    plain = route(x, router.bfloat16().float(), 2)
    same = top_k.route(x, {"": router.bfloat16().float()})
    assert torch.equal(plain.experts, same.experts)
    assert torch.allclose(plain.weights, same.weights)
