from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels import KERNELS, Experts, FeedForward, Projection, Routing, route

ROLES = ("gate", "up", "down")


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
    activation: Callable[[Tensor], Tensor] = functional.silu
    pushed: dict[int, float] = field(default_factory=dict)
    """What is added to the router logits of these experts, about, for every token."""


@dataclass(frozen=True)
class Block:
    """Random values of a case, in float64: the inputs of a kernel and an upstream gradient.

    `run` computes output and gradients, by name, in a precision.
    """

    case: Case
    values: dict[str, Tensor]
    upstream: Tensor
    frozen: dict[str, Tensor]
    norms: dict[str, Tensor]
    scaling: float = 1.7

    def run(
        self, kernel: str | Callable, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        adapter_dtype = adapter_dtype or dtype
        leaves = {
            name: value.detach().to(dtype if name == "x" else adapter_dtype, copy=True)
            for name, value in self.values.items()
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        routing = route(leaves["x"], leaves["router"], self.case.top_k)
        compute = KERNELS[kernel] if isinstance(kernel, str) else kernel
        y = compute(leaves["x"], routing, self.block(leaves, dtype, adapter_dtype))
        assert y.dtype == dtype
        y.backward(self.upstream.to(dtype))
        results = {"y": y.detach()}
        for name, leaf in leaves.items():
            assert leaf.grad is not None, name
            results[name] = leaf.grad
        return {name: result.double() for name, result in results.items()}

    def rounded(self, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Block:
        """The same block with values that fit in the given precisions, still in float64."""

        def cut(values: dict[str, Tensor]) -> dict[str, Tensor]:
            kinds = {name: dtype if name == "x" else adapter_dtype for name in values}
            return {name: value.to(kinds[name]).double() for name, value in values.items()}

        return replace(self, values=cut(self.values), norms=cut(self.norms))

    def block(self, leaves: dict[str, Tensor], dtype, adapter_dtype, dropout=0.0) -> FeedForward:
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
            projections.append(Projection(self.frozen[role].to(dtype), experts))
        return FeedForward(*projections, activation=self.case.activation, dropout=dropout)


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
    frozen, norms = {}, {}
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
            norms[role] = (frozen[role] + Block.scaling * b @ a).norm(dim=-1)
            values[f"{role}.magnitude"] = norms[role] * (1 + 0.3 * draw(*norms[role].shape))
    values["x"] = values["x"].to(dtype).double()
    upstream = draw(case.tokens, case.hidden).to(dtype).double()
    return Block(case, values, upstream, frozen, norms)


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
    pytest.param(Case(activation=gelu_tanh), id="GeGLU, as in Gemma"),
    pytest.param(Case(activation=gelu_tanh, dora=True, top_k=1), id="GeGLU with DoRA, K=1"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
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
