from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels import (
    KERNELS,
    ROLES,
    DropMask,
    Experts,
    FeedForward,
    FrozenLinear,
    Projection,
    Routing,
    draw_mask,
    route,
)
from mixlora_exp.kernels.mixlora.dense import dense_stage
from mixlora_exp.kernels.mixlora.grouped import grouped_stage
from mixlora_exp.kernels.mixlora.stage import run_stage


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and options of one block; the defaults are the plainest block."""

    tokens: int = 9
    hidden: int = 12
    inner: int = 20
    experts: int = 4
    top_k: int = 2
    rank: int = 2
    roles: tuple[str, ...] = ROLES
    dora: bool = False
    activation: str | Callable[[Tensor], Tensor] = functional.silu
    biased: tuple[str, ...] = ()
    """Which projections have a bias."""
    normalised: bool = True
    """Whether the routing's weights sum to 1, or are the probabilities as they are."""
    empty: bool = False
    """Whether some tokens have fewer experts than K, one of them none."""
    pushed: dict[int, float] = field(default_factory=dict)
    """What is added to the router logits of these experts, about, for every token."""


@dataclass(frozen=True)
class Masks:
    """The dropout masks of a block, sparse or as bool."""

    x: DropMask | None = None
    hidden: DropMask | None = None

    def as_bool(self) -> Masks:
        """The same masks, as `kept`."""
        made = [m and DropMask(m.kept(), m.scale, m.shape) for m in (self.x, self.hidden)]
        return Masks(*made)


def row_norms(weight: Tensor, values: dict[str, Tensor], role: str) -> Tensor:
    """||W + s B A|| by rows of each expert, from the whole matrix."""
    return (weight + Block.scaling * values[f"{role}.b"] @ values[f"{role}.a"]).norm(dim=-1)


@dataclass(frozen=True)
class Block:
    """Random values of a case, in float64: the inputs of a kernel and an upstream gradient.

    `run` computes output and gradients, by name, in a precision and under given dropout masks.
    """

    case: Case
    values: dict[str, Tensor]
    upstream: Tensor
    frozen: dict[str, Tensor]
    norms: dict[str, Tensor]
    biases: dict[str, Tensor]
    scaling: float = 1.7

    def route(self, x: Tensor, router: Tensor) -> Routing:
        """As `route` decides, with weights that sum to 1 only where the case says so, and empty
        slots in all places, the first and the last, that name any expert."""
        routing = route(x, router, self.case.top_k)
        weights, experts = routing.weights, routing.experts
        if not self.case.normalised:
            weights = routing.probabilities.gather(1, experts)
        if self.case.empty:
            numbers = torch.arange(weights.numel(), device=weights.device).view_as(weights)
            filled = (numbers % 5 != 1) & (numbers % 7 != 4)
            filled[len(filled) // 2] = False
            weights = torch.where(filled, weights, 0.0)
            experts = torch.where(filled, experts, numbers % self.case.experts)
        return replace(routing, weights=weights, experts=experts)

    def run(
        self,
        kernel: str | Callable,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype | None = None,
        masks: Masks | None = None,
    ) -> dict[str, Tensor]:
        adapter_dtype = adapter_dtype or dtype
        leaves = {
            name: value.detach().to(dtype if name == "x" else adapter_dtype, copy=True)
            for name, value in self.values.items()
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        routing = self.route(leaves["x"], leaves["router"])
        compute = KERNELS[kernel] if isinstance(kernel, str) else kernel
        block = self.block(leaves, dtype, adapter_dtype, masks=masks)
        y = compute(leaves["x"], routing, block)
        assert y.dtype == dtype
        y.backward(self.upstream.to(dtype))
        results = {"y": y.detach()}
        for name, leaf in leaves.items():
            assert leaf.grad is not None, name
            results[name] = leaf.grad
        return {name: result.double() for name, result in results.items()}

    def rounded(self, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Block:
        """The same block with values that fit in the given precisions, still in float64."""

        def cut(name: str, value: Tensor) -> Tensor:
            return value.to(dtype if name == "x" else adapter_dtype).double()

        values = {name: cut(name, value) for name, value in self.values.items()}
        norms = {role: cut(role, row_norms(self.frozen[role], values, role)) for role in self.norms}
        return replace(self, values=values, norms=norms)

    def block(
        self,
        leaves: dict[str, Tensor],
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        dropout: float = 0.0,
        masks: Masks | None = None,
    ) -> FeedForward:
        projections = []
        for role in ROLES:
            experts = None
            if role in self.case.roles:
                experts = Experts(
                    leaves[f"{role}.a"],
                    leaves[f"{role}.b"],
                    self.scaling,
                    leaves.get(f"{role}.magnitude"),
                    self.norms[role].to(adapter_dtype) if self.case.dora else None,
                )
            bias = self.biases[role].to(dtype) if role in self.biases else None
            frozen = FrozenLinear(self.frozen[role].to(dtype), bias)
            projections.append(Projection(frozen, experts))
        masks = masks or Masks()
        return FeedForward(*projections, self.case.activation, dropout, masks.x, masks.hidden)

    def masks(self, p: float, *, hashed: bool = False) -> Masks:
        """Masks of this block's shapes from the default generator, in the form of Triton's kernels
        if `hashed`."""
        shapes = (self.case.tokens, self.case.hidden), (self.case.tokens, self.case.inner)
        cpu = torch.device("cpu")
        return Masks(*(draw_mask(shape, p, cpu, hashed=hashed) for shape in shapes))


def make_block(case: Case, seed: int, dtype: torch.dtype = torch.float64) -> Block:
    """Random values for a case; `dtype` is the precision that x and the frozen weights fit in."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    values = {"x": draw(case.tokens, case.hidden)}
    values["router"] = draw(case.experts, case.hidden) * 0.5
    if case.pushed:
        values["x"][:, 0] = 4.0
        for expert, push in case.pushed.items():
            values["router"][expert, 0] = push / 4.0
    frozen, norms, biases = {}, {}, {}
    for role in ROLES:
        fan_in, fan_out = case.hidden, case.inner
        if role == "down":
            fan_in, fan_out = fan_out, fan_in
        frozen[role] = draw(fan_out, fan_in, scale=fan_in**-0.5).to(dtype).double()
        if role not in case.roles:
            continue
        a = draw(case.experts, case.rank, fan_in, scale=fan_in**-0.5)
        b = draw(case.experts, fan_out, case.rank, scale=case.rank**-0.5)
        values[f"{role}.a"], values[f"{role}.b"] = a, b
        if case.dora:
            norms[role] = row_norms(frozen[role], values, role)
            values[f"{role}.magnitude"] = norms[role] * (1 + 0.3 * draw(*norms[role].shape))
    for role in case.biased:
        biases[role] = draw(len(frozen[role]), scale=0.5).to(dtype).double()
    values["x"] = values["x"].to(dtype).double()
    upstream = draw(case.tokens, case.hidden).to(dtype).double()
    return Block(case, values, upstream, frozen, norms, biases)


def make_routing(probabilities: Tensor, top_k: int) -> Routing:
    weights, experts = probabilities.topk(top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(probabilities.log(), probabilities, experts, weights)


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


# What each case is for stands as its id.
CASES = [
    pytest.param(Case(), id="plain"),
    pytest.param(Case(tokens=1), id="one token, as in generation"),
    pytest.param(Case(hidden=7, inner=13), id="odd sizes, no multiple of a tile"),
    pytest.param(Case(experts=5, top_k=3), id="number of experts no power of two"),
    pytest.param(Case(top_k=1), id="K=1, weights are constant"),
    pytest.param(Case(experts=3, top_k=3), id="K=E, no expert is left out"),
    pytest.param(Case(experts=1, top_k=1), id="one expert, plain LoRA"),
    pytest.param(Case(pushed={2: -60.0}), id="an expert without tokens"),
    pytest.param(Case(pushed={1: 60.0}, top_k=1), id="all tokens to one expert"),
    pytest.param(Case(pushed={1: 60.0, 3: 60.0}), id="all tokens to the same two experts"),
    pytest.param(Case(rank=10, hidden=16), id="rank 10, no power of two"),
    pytest.param(Case(rank=32), id="rank above the hidden size"),
    pytest.param(Case(tokens=70), id="tokens beyond a multiple of 32, as bf16 rows are rounded"),
    pytest.param(Case(roles=("gate",)), id="experts on gate only"),
    pytest.param(Case(roles=("up",)), id="experts on up only"),
    pytest.param(Case(roles=("down",)), id="experts on down only, hidden state shared"),
    pytest.param(Case(roles=("gate", "up")), id="no experts on down"),
    pytest.param(Case(roles=("gate", "down")), id="no experts on up"),
    pytest.param(Case(dora=True), id="DoRA"),
    pytest.param(Case(dora=True, roles=("down",)), id="DoRA on down only, its own path"),
    pytest.param(Case(dora=True, roles=("gate", "up")), id="DoRA without down"),
    pytest.param(Case(dora=True, tokens=1, experts=3, top_k=3), id="DoRA, one token, K=E"),
    pytest.param(Case(dora=True, pushed={2: -60.0}), id="DoRA, an expert without tokens"),
    pytest.param(Case(dora=True, rank=10, hidden=16, tokens=37), id="DoRA, rank 10"),
    pytest.param(Case(dora=True, rank=32, top_k=1), id="DoRA, rank above the hidden size"),
    pytest.param(Case(activation=gelu_tanh), id="GeGLU, as in Gemma"),
    pytest.param(Case(activation=gelu_tanh, dora=True, top_k=1), id="GeGLU with DoRA, K=1"),
    pytest.param(Case(normalised=False), id="weights that do not sum to 1"),
    pytest.param(Case(empty=True), id="tokens with fewer experts than K, and with none"),
    pytest.param(Case(empty=True, dora=True, biased=ROLES), id="the same with DoRA and bias"),
    pytest.param(Case(empty=True, top_k=4, normalised=False), id="the same, up to all experts"),
    pytest.param(
        Case(empty=True, dora=True, roles=("down",), top_k=3, tokens=70),
        id="the same, DoRA on down",
    ),
    pytest.param(Case(biased=ROLES), id="bias"),
    pytest.param(Case(biased=ROLES, normalised=False), id="bias, weights that do not sum to 1"),
    pytest.param(Case(biased=ROLES, normalised=False, dora=True), id="DoRA and bias, the same"),
    pytest.param(Case(biased=ROLES, roles=("up",)), id="bias, experts on up only"),
    pytest.param(Case(biased=("gate",), dora=True), id="DoRA, bias on gate only"),
    pytest.param(
        Case(biased=ROLES, dora=True, roles=("gate",), normalised=False),
        id="DoRA and bias, experts on gate only",
    ),
    pytest.param(
        Case(biased=("down",), dora=True, roles=("down",), normalised=False, top_k=3),
        id="DoRA on down only, with a bias",
    ),
    pytest.param(
        Case(biased=ROLES, dora=True, tokens=70, activation=gelu_tanh), id="GeGLU, DoRA and bias"
    ),
]


def exact_grouped(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    return run_stage(grouped_stage, x, routing, block)


def exact_dense(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    return run_stage(dense_stage, x, routing, block)


# `exact` in both its forms, and every other kernel that runs on any device: a new one is among
# them. Those for one device have tests of their own.
EXACT = {"exact, grouped": exact_grouped, "exact, dense": exact_dense}
OTHERS = {
    name: kernel
    for name, kernel in KERNELS.items()
    if kernel.device is None and name not in ("reference", "exact")
}
FORMS = {**EXACT, **OTHERS}
# Those that take the masks they are given; `peft` draws its own.
MASKED = {**EXACT, **{name: kernel for name, kernel in OTHERS.items() if not kernel.draws_masks}}


HELD = [pytest.param(name, id=name) for name in ("sparse", "bool")]
# Of the products and of the adapter.
PRECISIONS = [
    pytest.param((torch.float32, torch.float32), id="float32"),
    pytest.param((torch.bfloat16, torch.float32), id="bf16 base, float32 adapter, as trained"),
    pytest.param((torch.bfloat16, torch.bfloat16), id="bf16 throughout"),
]


def pairs(forms: dict[str, Callable], third: list[Any]) -> list[Any]:
    """Each case with each form, and one of `third` with each of these, in turn."""
    found = []
    for first, case in enumerate(CASES):
        for second, (name, form) in enumerate(forms.items()):
            other = third[(first + second) % len(third)]
            values = (*case.values, form, *other.values)
            found.append(pytest.param(*values, id=f"{case.id}-{name}-{other.id}"))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "precision" in names:
        metafunc.parametrize(("case", "compute", "precision"), pairs(FORMS, PRECISIONS))
    elif {"case", "held"} <= set(names):
        metafunc.parametrize(("case", "compute", "held"), pairs(MASKED, HELD))
    elif "case" in names:
        metafunc.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products run faster, and alike everywhere, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def block_of() -> Callable[..., Block]:
    """A case with random values from a seed."""
    return make_block


@pytest.fixture
def plain() -> Case:
    return Case()


@pytest.fixture
def routing_of() -> Callable[[Tensor, int], Routing]:
    """The routing that given probabilities lead to."""
    return make_routing


@pytest.fixture
def fresh_seed() -> int:
    """Another seed each time; pytest shows it when the test fails."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # noqa: T201
    torch.manual_seed(seed)
    return seed


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request: pytest.FixtureRequest) -> Callable:
    """Each kernel but the reference, `exact` in both its forms."""
    return request.param


@pytest.fixture(params=MASKED.values(), ids=MASKED.keys())
def masked_form(request: pytest.FixtureRequest) -> Callable:
    """Each of them that takes dropout masks."""
    return request.param


@pytest.fixture(params=EXACT.values(), ids=EXACT.keys())
def exact_form(request: pytest.FixtureRequest) -> Callable:
    return request.param


@pytest.fixture
def exact_forms() -> dict[str, Callable]:
    """Both forms of the exact kernel, by name."""
    return EXACT


def check_same(results: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Output and all gradients, equal as far as float64 goes."""
    assert results.keys() == truth.keys()
    for name, result in results.items():
        torch.testing.assert_close(
            result, truth[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    return check_same


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many (token, slot) pairs the grouped form takes at a time."""

    def set_rows(count: int) -> None:
        monkeypatch.setattr("mixlora_exp.kernels.mixlora.expert_segments.BLOCK_ROWS", count)

    return set_rows
