"""Each router with a block behind it against its formula, token by token in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels import (
    KERNELS,
    Experts,
    FeedForward,
    FrozenLinear,
    Kernel,
    Projection,
    Router,
    make_router,
)
from mixlora_exp.kernels.mixlora.dense import dense_stage
from mixlora_exp.kernels.mixlora.stage import run_stage

T, D, F, E, R, K = 17, 6, 8, 5, 2, 2
REAL = torch.tensor([t % 4 != 1 for t in range(T)])
REAL_ROWS = [t for t in range(T) if REAL[t]]
BLOCKS = {
    **{name: kernel for name, kernel in KERNELS.items() if kernel.device is None},
    "dense form": Kernel("dense form", partial(run_stage, dense_stage)),
}


def best(logits: Tensor) -> list[int]:
    """Experts of one token, the most probable first, the lower index where they tie."""
    return sorted(range(E), key=lambda e: -float(logits[e]))


def of_chosen(p: Tensor, chosen: list[list[int]]) -> Tensor:
    """(T, E): p of the chosen experts, else 0."""
    return p * torch.tensor([[float(e in own) for e in range(E)] for own in chosen])


def balance(p: Tensor, chosen: list[list[int]], slots: float | None = None) -> Tensor:
    """E sum_e F_e P_e over the real tokens; F_e: how often e is chosen, over their number or over
    `slots`."""
    named = [e for t in REAL_ROWS for e in chosen[t]]
    total = len(REAL_ROWS) if slots is None else slots
    shares = torch.tensor([named.count(e) for e in range(E)]).double() / total
    return E * (shares * p[REAL].mean(dim=0)).sum()


def top_k(z: Tensor, p: Tensor, x: Tensor, weights: dict[str, Tensor], *, raw: bool = False):
    chosen = [best(row)[:K] for row in z]
    kept = of_chosen(p, chosen)
    made = kept if raw else kept / kept.sum(dim=1, keepdim=True)
    return made, None, balance(p, [own[:1] for own in chosen])


def top_p(z, p, x, weights, share: float, limit: int = E, *, raw: bool = False, topk: bool = False):
    chosen = []
    for t in range(T):
        own, mass = [], 0.0
        for e in best(z[t])[:limit]:
            if mass < share:
                own.append(e)
            mass += float(p[t, e])
        chosen.append(own)
    kept = of_chosen(p, chosen)
    made = kept if raw else kept / kept.sum(dim=1, keepdim=True)
    slots = None if topk else sum(len(chosen[t]) for t in REAL_ROWS)
    return made, None, balance(p, chosen, slots)


def switch(z, p, x, weights, factor: float = 1.25, *, ones: bool = False):
    first = [best(row)[0] for row in z]
    room = [math.ceil(factor * len(REAL_ROWS) / E)] * E
    kept, left = [], []
    for t in range(T):
        takes = t in REAL_ROWS and room[first[t]] > 0
        room[first[t]] -= takes
        kept.append([first[t]] if takes else [])
        left.append(float(t in REAL_ROWS and not takes))
    most = torch.ones(T) if ones else torch.stack([p[t, first[t]] for t in range(T)])
    made = of_chosen(torch.ones_like(p) if ones else p, kept)
    return made, most * torch.tensor(left), balance(p, [[e] for e in first])


def of_all_rows(p: Tensor, chosen: list[list[int]]) -> Tensor:
    """`balance` with padding, and every chosen expert."""
    named = [e for own in chosen for e in own]
    shares = torch.tensor([named.count(e) for e in range(E)]).double() / T
    return E * (shares * p.mean(dim=0)).sum()


def official_top_p(z, p, x, weights, share: float, divisor: float = 1.0):
    chosen = []
    for t in range(T):
        own, mass = [], 0.0
        for e in best(z[t]):
            own.append(e)
            mass += float(p[t, e] / divisor)
            if mass > share:
                break
        chosen.append(own)
    return of_chosen(p / divisor, chosen), None, of_all_rows(p, chosen)


def official_switch(z, p, x, weights, capacity: int):
    taken, kept = [0] * E, []
    first = [best(row)[0] for row in z]
    for e in first:
        taken[e] += 1
        kept.append([e] if taken[e] <= capacity else [])
    most = torch.stack([p[t, first[t]] for t in range(T)])
    left = torch.tensor([float(not own) for own in kept])
    return of_chosen(p, kept), most * left, of_all_rows(p, [[e] for e in first])


def uniform(z: Tensor, p: Tensor, x: Tensor, weights: dict[str, Tensor]):
    return torch.full((T, E), 1 / E, dtype=torch.float64), None, torch.zeros(())


def dense(z: Tensor, p: Tensor, x: Tensor, weights: dict[str, Tensor]):
    return p, None, E * p[REAL].mean(dim=0).square().sum()


def threshold(z, p, x, weights, t_max: float = 1 / E, *, shifted: bool = False, raw: bool = False):
    level = t_max / (1 + (-(x @ weights["threshold"].T + weights["threshold_bias"])).exp())
    above = p - level
    chosen = [[e for e in range(E) if above[t, e] > 0] for t in range(T)]
    kept = of_chosen(above, chosen)
    total = kept.sum(dim=1, keepdim=True)
    made = kept if raw else kept / torch.where(total == 0, 1.0, total)
    base = torch.tensor([float(not own) for own in chosen])
    slots = sum(len(chosen[t]) for t in REAL_ROWS)
    return made, base, balance(above if shifted else p, chosen, slots)


FORMULAS = [
    pytest.param("top_k", {}, top_k, id="top_k"),
    pytest.param(
        "top_k", {"normalise": False, "z_loss": 0.2, "temperature": 4}, partial(top_k, raw=True),
        id="top_k, with options",
    ),
    pytest.param("random_frozen", {}, top_k, id="random_frozen"),
    pytest.param("top_p", {"p": 0.7}, partial(top_p, share=0.7), id="top_p"),
    pytest.param("top_p", {}, partial(top_p, share=0.8), id="top_p, by default"),
    pytest.param("top_p", {"p": 1, "limit": 0}, partial(top_p, share=9), id="top_p, all"),
    pytest.param(
        "top_p", {"p": 0.9, "limit": 2, "normalise": False, "temperature": 2},
        partial(top_p, share=0.9, limit=2, raw=True), id="top_p, with options",
    ),
    pytest.param(
        "top_p", {"p": 0.7, "router_loss": "topk"}, partial(top_p, share=0.7, topk=True),
        id="top_p, loss by the share of rows",
    ),
    pytest.param("switch", {"z_loss": 1e-3}, switch, id="switch"),
    pytest.param(
        "switch", {"capacity_factor": 0.5, "z_loss": 0}, partial(switch, factor=0.5),
        id="switch, some rows left over",
    ),
    pytest.param(
        "switch", {"capacity_factor": 0.5, "normalise": True, "z_loss": 0},
        partial(switch, factor=0.5, ones=True), id="switch, normalised",
    ),
    pytest.param(
        "top_p", {"p": 0.2, "exceed": True, "normalise": False, "padding_in_loss": True,
                  "router_loss": "topk"},
        partial(official_top_p, share=0.2), id="top_p, more than p",
    ),
    pytest.param(
        "top_p", {"p": 0.8, "exceed": True, "divisor": 0.7, "normalise": False,
                  "padding_in_loss": True, "router_loss": "topk"},
        partial(official_top_p, share=0.8, divisor=0.7), id="top_p, divided",
    ),
    pytest.param(
        "switch", {"capacity": 2, "skip": True, "z_loss": 0.01, "padding_in_loss": True},
        partial(official_switch, capacity=2), id="switch, as moe-peft",
    ),
    pytest.param("uniform", {}, uniform, id="uniform"),
    pytest.param("dense", {}, dense, id="dense"),
    pytest.param("dense", {"temperature": 2}, dense, id="dense, temperature"),
    pytest.param("threshold", {}, threshold, id="threshold"),
    pytest.param(
        "threshold", {"t_max": 0.9, "shifted_loss": True},
        partial(threshold, t_max=0.9, shifted=True), id="threshold, some rows without any",
    ),
    pytest.param(
        "threshold", {"normalise": False}, partial(threshold, raw=True),
        id="threshold, not normalised",
    ),
]  # fmt: skip
"""Name, options or settings, and (logits, probabilities, x, weights) -> (weights (T, E), those of
the block without experts (T,) or None, the loss)."""


def router_of(name: str, options: dict, **settings) -> Router:
    settings |= {"num_experts": E, "top_k": K}
    settings |= {key: value for key, value in options.items() if key.startswith("router_")}
    own = {key: value for key, value in options.items() if key not in settings}
    return make_router(name, settings, own)


def whole(number: int, *shape: int) -> Tensor:
    """Small whole numbers, of which logits are exact and often equal."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(-1, 2, shape, generator=generator).double()


def leaves_of(own) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {"x": whole(1, T, D)}
    found["x"][3] = 0
    for name, weight in own.initial(D).items():
        found[f"router {name}"] = whole(2 + len(name), *weight.shape)
    for role, width, out in (("gate", D, F), ("up", D, F), ("down", F, D)):
        found[f"A {role}"], found[f"B {role}"] = draw(E, R, width), draw(E, out, R)
    return {name: value.requires_grad_() for name, value in found.items()}


FROZEN = {
    role: torch.randn(out, width, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for role, width, out in (("gate", D, F), ("up", D, F), ("down", F, D))
}


def by_formula(formula: Callable, options: dict, leaves: dict[str, Tensor]) -> list[Tensor]:
    """(the block's output (T, D), the router's loss)."""
    x = leaves["x"]
    held = {name[7:]: value for name, value in leaves.items() if name.startswith("router ")}
    z = x @ held[""].T / options.get("temperature", 1) if held else x.new_zeros(T, E)
    p = z.exp() / z.exp().sum(dim=1, keepdim=True)
    weights, base, loss = formula(z, p, x, held)

    def feed_forward(row: Tensor, e: int | None) -> Tensor:
        gate, up, down = (
            FROZEN[role]
            if e is None
            else FROZEN[role] + 0.5 * leaves[f"B {role}"][e] @ leaves[f"A {role}"][e]
            for role in ("gate", "up", "down")
        )
        return down @ (functional.silu(gate @ row) * (up @ row))

    rows = []
    for t in range(T):
        y = sum(weights[t, e] * feed_forward(x[t], e) for e in range(E) if weights[t, e] != 0)
        rest = x[t] if options.get("skip") else feed_forward(x[t], None)
        rows.append(y if base is None else y + base[t] * rest)
    seen = slice(None) if options.get("padding_in_loss") else REAL
    loss = loss + options.get("z_loss", 0) / 1e-3 * z.exp().sum(dim=1).log().square()[seen].mean()
    return [torch.stack(rows), loss]


def block_of(leaves: dict[str, Tensor]) -> FeedForward:
    return FeedForward(
        *(
            Projection(FrozenLinear(FROZEN[r]), Experts(leaves[f"A {r}"], leaves[f"B {r}"], 0.5))
            for r in ("gate", "up", "down")
        ),
        "silu",
    )


def by_router(kernel: Kernel, own, leaves: dict[str, Tensor]) -> list[Tensor]:
    x = leaves["x"]
    held = {name[7:]: value for name, value in leaves.items() if name.startswith("router ")}
    routing = own.route_masked(x, held, REAL)
    loss = own.auxiliary_loss(own.gathered([own.statistics(routing, REAL)]))
    return [kernel(x, routing, block_of(leaves)), loss]


@pytest.mark.parametrize("kernel", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS)
def test_output_loss_and_all_gradients(name, options, formula, kernel) -> None:
    own = router_of(name, options)
    found = []
    for made_by in (partial(by_formula, formula, options), partial(by_router, kernel, own)):
        leaves = leaves_of(own)
        y, loss = made_by(leaves)
        objective = (y * torch.cos(torch.arange(T * D)).view(T, D)).sum() + 3 * loss
        grads = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
        found.append([y.detach(), loss.detach(), *grads])
    for what, one, other in zip(["y", "loss", *leaves], *found, strict=True):
        one, other = (torch.zeros(()) if g is None else g for g in (one, other))
        error = (one - other).abs().max() / one.abs().max().clamp(min=1)
        assert error < 1e-10, what


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS)
def test_the_sum_over_modules_is_their_number_times_the_mean(name, options, formula) -> None:
    found = []
    for reduction in ("mean", "sum"):
        own = router_of(name, options, router_loss_reduction=reduction)
        leaves = leaves_of(own)
        held = {n[7:]: v for n, v in leaves.items() if n.startswith("router ")}
        each = [own.statistics(own.route(x, held), None) for x in (leaves["x"], whole(8, 9, D))]
        found.append(own.auxiliary_loss(own.gathered(each)))
    torch.testing.assert_close(found[1], 2 * found[0])


def test_compiled_blocks_have_the_rows_without_experts_too() -> None:
    own = router_of("switch", {"capacity_factor": 0.5})
    leaves = leaves_of(own)
    function = partial(by_router, BLOCKS["dense form"], own)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(leaves), function(leaves))


def test_some_rows_alone_are_given_to_the_block_without_experts_too() -> None:
    own = router_of("switch", {"capacity_factor": 0.25})
    leaves, rows = leaves_of(own), torch.arange(3, T, 2)
    x = leaves["x"]
    routing = own.route_masked(x, {"": leaves["router "]}, REAL)
    block, kernel = block_of(leaves), BLOCKS["exact"]
    some = kernel(x[rows], routing.at(rows), block)
    torch.testing.assert_close(some, kernel(x, routing, block)[rows])
    assert routing.base[rows].count_nonzero() > 1
