"""What every registered router promises, with the defaults of its options and with some others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels import (
    KERNELS,
    Experts,
    FeedForward,
    FrozenLinear,
    Projection,
    Router,
    Routing,
    make_router,
)
from mixlora_exp.kernels.lora_many import lora_add
from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.router_base import ROUTERS as REGISTERED

# By default the loss of this one does not reach all of its weights.
OPTIONS = {"threshold": {"shifted_loss": True}}
ROUTERS = [
    *(pytest.param(name, OPTIONS.get(name, {}), id=name) for name in REGISTERED),
    pytest.param("top_k", {"precision": "bfloat16"}, id="top_k, rounded"),
    pytest.param("top_k", {"z_loss": 0.01, "temperature": 3}, id="top_k, z-loss"),
    pytest.param("top_p", {"p": 1, "limit": 2}, id="top_p, limited"),
    pytest.param("switch", {"capacity_factor": 0.5}, id="switch, crowded"),
    pytest.param("switch", {"capacity": 2, "skip": True}, id="switch, as moe-peft"),
    pytest.param(
        "top_p",
        {"p": 0.7, "exceed": True, "divisor": 0.9, "normalise": False},
        id="top_p, as moe-peft",
    ),
    pytest.param(
        "threshold", {"t_max": 0.3, "normalise": False, "shifted_loss": True}, id="threshold, high"
    ),
]
"""Name and options."""

EXPERTS, TOP_K = 5, 3


def made(name: str, options: dict, **settings) -> Router:
    return make_router(name, {"num_experts": EXPERTS, "top_k": TOP_K, **settings}, options)


def decide(own: Router, width: int = 7, **given) -> tuple[Routing, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    weights = {n: w.mul(20).requires_grad_() for n, w in own.initial(width).items()}
    x = torch.randn(11, width, requires_grad=True)
    return own.route(x, weights, **given), weights, x


class Own(Router):
    """A router of somebody else, with all that it inherits."""

    def route(self, x, weights, *, training=False, fused=False) -> Routing:
        raise AssertionError("not asked to decide")


def test_one_expert_per_row_teaches_a_router_nothing() -> None:
    """Its weight, normalised, is always 1, unless the router says otherwise."""
    own = Own(num_experts=EXPERTS, top_k=1)
    assert not own.learns_with(1)
    assert own.learns_with(2)


@pytest.mark.parametrize("width", [7, 16], ids="rows of {}".format)
@pytest.mark.parametrize(("name", "options"), ROUTERS)
def test_decision(name, options, width) -> None:
    """K distinct experts at most, weights of 0 in empty slots, float32; the same each time."""
    routing, _, _ = decide(made(name, options), width)
    count = routing.experts.shape[1]
    assert 1 <= count <= EXPERTS
    assert routing.experts.shape == routing.weights.shape == (11, count)
    assert routing.logits.shape == routing.probabilities.shape == (11, EXPERTS)
    assert routing.weights.dtype is torch.float32
    assert (routing.weights >= 0).all()
    assert routing.experts.min() >= 0
    assert routing.experts.max() < EXPERTS
    for chosen, filled in zip(routing.experts, routing.filled, strict=True):
        assert len(set(chosen[filled].tolist())) == int(filled.sum())
    again, _, _ = decide(made(name, options), width)
    assert torch.equal(again.experts, routing.experts)
    assert torch.equal(again.weights, routing.weights)


@pytest.mark.parametrize(("name", "options"), ROUTERS)
def test_loss_has_gradients_and_leaves_padding_out(name, options) -> None:
    """Statistics of modules with rows of other widths stack; counts are those of real rows."""
    own = made(name, options)
    mask = torch.arange(11) < 8
    routings = [decide(own, width) for width in (7, 16)]
    each = [own.statistics(routing, mask) for routing, _, _ in routings]
    loss = own.auxiliary_loss({n: torch.stack([s[n] for s in each]) for n in each[0]})
    assert loss.shape == ()
    if own.initial(7):
        loss.backward()
    for routing, weights, x in routings:
        assert all(weight.grad.abs().max() > 0 for weight in weights.values())
        if weights:
            assert x.grad[:8].abs().max() > 0
            assert (x.grad[8:] == 0).all()
        counts = own.statistics(routing, mask)["counts"]
        expected = routing.experts[:8][routing.filled[:8]].bincount(minlength=EXPERTS)
        assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "options"), ROUTERS)
def test_task_loss_reaches_the_router(name, options) -> None:
    """Through the weights, by the kernels' own backward passes, as by the definition."""
    own = made(name, options)
    found = []
    torch.manual_seed(1)
    matrices = [torch.randn(size) for size in ((9, 7), (9, 7), (7, 9))]
    lows = [
        (torch.randn(EXPERTS, 2, m.shape[1]), torch.randn(EXPERTS, m.shape[0], 2)) for m in matrices
    ]
    block = FeedForward(
        *(
            Projection(FrozenLinear(m), Experts(a, b, 0.5))
            for m, (a, b) in zip(matrices, lows, strict=True)
        ),
        "silu",
    )
    for kernel in ("exact", "reference"):
        routing, weights, x = decide(own)
        KERNELS[kernel](x, routing, block).square().sum().backward()
        found.append([x.grad, *(weight.grad for weight in weights.values())])
    for one, other in zip(*found, strict=True):
        if one is None and other is None:
            # A weight that takes part in training alone, as that of a router's noise.
            continue
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(("name", "options"), ROUTERS)
def test_a_router_serves_a_single_projection(name, options, dora) -> None:
    """sum_k w_k scale_e (W x + s B_e A_e x) of a layer that is not square, by its definition and by
    the kernel of linear layers with the experts as its adapters; float64, with all gradients."""
    own, rows, width, out = made(name, options), 11, 7, 10
    torch.manual_seed(0)
    frozen = torch.randn(out, width, dtype=torch.float64)
    a, b = (torch.randn(EXPERTS, *s, dtype=torch.float64) for s in ((2, width), (out, 2)))
    norms = (frozen + 0.5 * b @ a).norm(dim=-1)
    drawn = {"x": torch.randn(rows, width), "a": a, "b": b, "magnitude": norms * 1.3}
    drawn |= {f"router {name}": 5 * weight for name, weight in own.initial(width).items()}
    upstream = torch.randn(rows, out, dtype=torch.float64)

    def by_definition(x, a, b, magnitude, routing) -> Tensor:
        y = [torch.zeros(out, dtype=torch.float64) for _ in range(rows)]
        for token, slot in routing.filled.nonzero().tolist():
            e = int(routing.experts[token, slot])
            term = frozen @ x[token] + 0.5 * b[e] @ (a[e] @ x[token])
            scale = magnitude[e] / norms[e] if dora else 1.0
            y[token] = y[token] + routing.weights[token, slot] * scale * term
        return torch.stack(y)

    def by_kernel(x, a, b, magnitude, routing) -> Tensor:
        scales = zip(magnitude, norms, strict=True) if dora else [(None, None)] * EXPERTS
        parts = [LowRankPart(a[e], b[e], 0.5, *scale) for e, scale in enumerate(scales)]
        every = x.repeat(EXPERTS, 1)
        y = lora_add(every @ frozen.T, every, *parts).view(EXPERTS, rows, out)
        shares = torch.zeros(rows, EXPERTS, dtype=torch.float64)
        shares = shares.scatter_add(1, routing.experts, routing.weights.double())
        return torch.einsum("te,eto->to", shares, y)

    found = []
    for compute in (by_definition, by_kernel):
        leaves = {n: v.detach().double().requires_grad_() for n, v in drawn.items()}
        weights = {n.removeprefix("router "): v for n, v in leaves.items() if "router" in n}
        routing = own.route(leaves["x"], weights)
        y = compute(*(leaves[n] for n in ("x", "a", "b", "magnitude")), routing)
        y.backward(upstream)
        # What a router draws noise with has no part outside of training.
        idle = {"router noise"} if dora else {"router noise", "magnitude"}
        grads = [leaf.grad for n, leaf in leaves.items() if n not in idle]
        assert all(grad.abs().max() > 0 for grad in grads)
        found.append([y.detach(), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_settings_come_from_the_adapter_and_options_from_their_own_place() -> None:
    own = made("top_k", {}, router_loss="topk", router_init_std=0.5, router_precision="bfloat16")
    assert (own.loss, own.init_std, own.precision) == ("topk", 0.5, "bfloat16")
    with pytest.raises(ValueError, match=r"router_options.p is not an option of router=top_k"):
        made("top_k", {"p": 0.3})
    with pytest.raises(ValueError, match="router='best' is unknown: choose from .*top_k"):
        made("best", {})


def test_switch_says_whether_it_skips_the_block() -> None:
    """And which share of rows goes to the frozen block at most; plans count by both."""
    assert made("switch", {"capacity": 2, "skip": True}).skips is True
    own = made("switch", {"capacity_factor": 1.25})
    assert (own.skips, own.base_share) == (False, 1 - 1.25 / EXPERTS)


@pytest.mark.parametrize("option", ["temperature", "jitter", "z_loss"])
def test_one_launch_is_for_the_defaults_alone(option) -> None:
    """`fused` changes no decision where an option differs, and without it no kernel is asked."""
    options = {option: {"temperature": 3.0}.get(option, 0.01)}
    for settings, fused in ((options, True), (options, False), ({}, False)):
        found, *_ = decide(made("top_k", settings), fused=fused)
        expected, *_ = decide(made("top_k", settings))
        assert "report" not in found.extra
        assert torch.equal(found.weights, expected.weights)


@pytest.mark.parametrize("jitter", [-0.1, 1.0, 1.5])
def test_noise_that_could_turn_an_input_s_sign_is_refused(jitter) -> None:
    with pytest.raises(ValueError, match="jitter"):
        made("top_k", {"jitter": jitter})


@pytest.mark.parametrize("name", ["top_k", "top_p", "dense"])
def test_noise_is_of_training_alone(name) -> None:
    x, weights = torch.randn(11, 7), {"": torch.randn(EXPERTS, 7)}
    noisy, plain = (made(name, {"jitter": jitter}) for jitter in (0.5, 0.0))
    assert torch.equal(noisy.route(x, weights).weights, plain.route(x, weights).weights)
    found = noisy.route_masked(x, weights, None)
    assert torch.equal(found.weights, plain.route(x, weights).weights)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("top_p", {"p": 0.0}),
        ("top_p", {"p": -0.5}),
        ("top_p", {"p": 1.5}),
        ("top_p", {"divisor": -1.0}),
        ("top_p", {"limit": -1}),
        ("top_p", {"limit": EXPERTS + 1}),
        ("threshold", {"t_max": 0.0}),
        ("threshold", {"t_max": 1.5}),
        ("switch", {"capacity_factor": 0.0}),
        ("switch", {"capacity": -1}),
        ("top_k", {"temperature": 0.0}),
        ("top_k", {"z_loss": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        made(name, options)


@pytest.mark.parametrize(("name", "options"), ROUTERS)
def test_only_a_capacity_counts_by_sequence(name, options) -> None:
    own = made(name, options)
    assert own.by_sequence is ("capacity" in options)
    assert 1 <= own.slots <= EXPERTS
    assert 0.0 <= own.base_share <= 1.0
