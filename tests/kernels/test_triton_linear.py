"""LoRA and DoRA of linear layers that share their input: by Triton kernels, compiled on a GPU and
elsewhere interpreted, and by the steps that are written for `torch.compile`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, GPU, load

from mixlora_exp.kernels import FrozenLinear, draw_mask, lora, plain_linear
from mixlora_exp.kernels.dropout import HashMask
from mixlora_exp.kernels.lora_many import lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.shapes import Low

(linear_launch,) = load("linear_launch")

# The interpreter's bf16 products are wrong on a CPU.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
NAMES = ("a", "b", "magnitude", "norm")


@pytest.fixture(autouse=True)
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What `lora_linears` takes, whatever the device: the kernels unless a test asks for others."""
    chosen = getattr(request, "param", linear_launch)
    monkeypatch.setattr(lora, "steps_on", lambda device: chosen)
    return chosen


BOTH = pytest.mark.parametrize(
    "steps", [linear_launch, plain_linear], ids=["Triton", "plain"], indirect=True
)


@dataclass(frozen=True)
class Case:
    """Projections of one input: their widths and ranks, which have DoRA, which a mask."""

    tokens: int = 20
    size: int = 40
    widths: tuple[int, ...] = (24, 33, 48)
    ranks: tuple[int, ...] = (2, 10, 17)
    dora: tuple[int, ...] = ()
    masked: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Group:
    """Values of a case in float64, and an upstream gradient for each projection."""

    x: Tensor
    weights: list[Tensor]
    parts: list[LowRankPart]
    upstream: list[Tensor]

    def leaves(self, dtype: torch.dtype, adapters: torch.dtype) -> Group:
        """A copy in other precisions that asks for gradients."""

        def leaf(value: Tensor | None, kind: torch.dtype, needed: bool = True) -> Tensor | None:
            if value is None:
                return None
            return value.detach().to(DEVICE, kind, copy=True).requires_grad_(needed)

        parts = []
        for part in self.parts:
            values = {n: leaf(getattr(part, n), adapters, n != "norm") for n in NAMES}
            parts.append(replace(part, **values))
        return Group(
            leaf(self.x, dtype),
            [weight.to(DEVICE, dtype) for weight in self.weights],
            parts,
            [dy.to(DEVICE, dtype) for dy in self.upstream],
        )

    @property
    def frozen(self) -> list[FrozenLinear]:
        return [FrozenLinear(weight) for weight in self.weights]

    def results(self, ys: Sequence[Tensor]) -> dict[str, Tensor]:
        """Outputs and gradients by name, after a backward pass; each of the dtype of its own."""
        torch.autograd.backward(ys, self.upstream)
        found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        owners = {"x": self.x}
        for i, part in enumerate(self.parts):
            owners |= {f"{n}{i}": getattr(part, n) for n in NAMES[:3]}
        for name, owner in owners.items():
            if owner is not None:
                assert owner.grad.dtype == owner.dtype, name
                assert name == "x" or owner.grad.is_contiguous(), name
                found[name] = owner.grad
        return {name: value.cpu().double() for name, value in found.items()}


def draw(case: Case, seed: int) -> Group:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    keys = torch.randint(-(2**62), 2**62, (case.tokens,), generator=generator).to(DEVICE)
    weights, parts = [], []
    for i, (width, rank) in enumerate(zip(case.widths, case.ranks, strict=True)):
        weight = normal(width, case.size) / case.size**0.5
        a, b = normal(rank, case.size) / case.size**0.5, normal(width, rank) / rank**0.5
        norm = (weight + 1.7 * b @ a).norm(dim=-1) if i in case.dora else None
        magnitude = None if norm is None else norm * (1 + 0.3 * normal(width))
        masked = i in case.masked
        mask = HashMask.of(keys, 99 * i - 7, 0.3, case.size) if masked else None
        weights.append(weight)
        parts.append(LowRankPart(a, b, 1.7, magnitude, norm, mask))
    upstream = [normal(case.tokens, width) for width in case.widths]
    return Group(normal(case.tokens, case.size), weights, parts, upstream)


def definition(x: Tensor, frozen: Sequence, parts: Sequence[LowRankPart]) -> list[Tensor]:
    return [
        lora_add_reference(base.linear(x), x, part)
        for base, part in zip(frozen, parts, strict=True)
    ]


def run(
    compute: Callable, group: Group, dtype: torch.dtype, adapters: torch.dtype
) -> dict[str, Tensor]:
    own = group.leaves(dtype, adapters)
    if compute is lora.lora_linears:
        assert lora.steps_on(DEVICE).supports(own.x, own.parts)
    ys = compute(own.x, own.frozen, own.parts)
    assert all(y.dtype == dtype for y in ys)
    return own.results(ys)


def exact(group: Group) -> dict[str, Tensor]:
    return run(definition, group, torch.float64, torch.float64)


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result - truth).norm() / truth.norm().clamp(min=1e-30))


def check_close(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert relative(value, truth[name]) < 1e-5, name


ONE = {"widths": (24,), "ranks": (10,)}
CASES = [
    pytest.param(Case(), id="three of different ranks"),
    pytest.param(Case(dora=(0, 1, 2)), id="three, DoRA"),
    pytest.param(Case(dora=(1,)), id="DoRA beside LoRA"),
    pytest.param(Case(widths=(24, 33), ranks=(16, 3), dora=(0, 1)), id="two"),
    pytest.param(Case(**ONE), id="one"),
    pytest.param(Case(**ONE, dora=(0,), masked=()), id="one, DoRA without dropout"),
    pytest.param(Case(masked=(1,)), id="dropout for one of three"),
    pytest.param(Case(masked=()), id="no dropout"),
    pytest.param(Case(tokens=1, dora=(0, 2)), id="one token"),
    pytest.param(Case(tokens=16, size=32, widths=(16, 32, 16), dora=(2,)), id="whole tiles"),
    pytest.param(Case(tokens=17, size=7, widths=(5, 3, 1), dora=(0,)), id="narrower than a tile"),
    pytest.param(Case(ranks=(1, 64, 60), dora=(1,)), id="ranks above the sizes"),
]


@BOTH
@pytest.mark.parametrize("shape", CASES)
def test_equals_the_definition(fresh_seed, steps, shape) -> None:
    """Outputs and every gradient, for new inputs each time."""
    group = draw(shape, fresh_seed)
    check_close(run(lora.lora_linears, group, torch.float32, torch.float32), exact(group))


# In float32, `test_equals_the_definition` bounds the error of every case: one is enough here.
@pytest.mark.parametrize(
    ("dtype", "dora"),
    [
        pytest.param(torch.float32, (0, 1, 2), marks=pytest.mark.slow),
        *((dtype, (0, 1, 2)) for dtype in DTYPES[1:]),
        *(pytest.param(dtype, (), marks=pytest.mark.slow) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_is_as_precise_as_the_definition(dtype, dora) -> None:
    """Its error is at most twice the definition's in the same precision, in the mean."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(3):
        group = draw(Case(dora=dora), seed)
        rounded = replace(
            group,
            x=group.x.to(dtype).double(),
            weights=[weight.to(dtype).double() for weight in group.weights],
            upstream=[dy.to(dtype).double() for dy in group.upstream],
        )
        truth = exact(rounded)
        found, plain = (
            run(compute, rounded, dtype, torch.float32)
            for compute in (lora.lora_linears, definition)
        )
        for name, value in truth.items():
            pair = relative(found[name], value), relative(plain[name], value)
            errors.setdefault(name, []).append(pair)
    floor = torch.finfo(dtype).eps / 2
    for name, pairs in errors.items():
        error, allowed = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert error <= 2 * allowed + floor, (name, error, allowed)


def test_same_input_same_bits() -> None:
    group = draw(Case(dora=(1,)), 0)
    first, second = (run(lora.lora_linears, group, DTYPES[-1], torch.float32) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_copies_in_the_products_dtype_stand_for_the_parameters() -> None:
    """They are what is multiplied with; the parameters get the gradients."""
    group = draw(Case(dora=(1,)), 0)
    own, other = group.leaves(torch.float16, torch.float32), draw(Case(dora=(1,)), 1)
    mixed = [
        replace(part, a=drawn.a, b=drawn.b)
        for part, drawn in zip(group.parts, other.parts, strict=True)
    ]
    lows = [Low(p.a.to(DEVICE, torch.float16), p.b.to(DEVICE, torch.float16)) for p in other.parts]
    parts = [replace(part, low=low) for part, low in zip(own.parts, lows, strict=True)]
    found = own.results(lora.lora_linears(own.x, own.frozen, parts))
    expected = run(lora.lora_linears, replace(group, parts=mixed), torch.float16, torch.float32)
    for name, value in found.items():
        assert relative(value, expected[name]) < 2e-3, name
    # A copy in another dtype is none of these products'.
    again = group.leaves(torch.float32, torch.float32)
    parts = [replace(part, low=low) for part, low in zip(again.parts, lows, strict=True)]
    check_close(again.results(lora.lora_linears(again.x, again.frozen, parts)), exact(group))


@pytest.mark.parametrize("dora", [(), (0, 1, 2)], ids=["LoRA", "DoRA"])
def test_input_that_needs_no_gradient(dora) -> None:
    """As in the first layer: the frozen weights are then not multiplied with again."""
    group = draw(Case(dora=dora), 0)
    expected = run(lora.lora_linears, group, torch.float32, torch.float32)
    own = group.leaves(torch.float32, torch.float32)

    class Forward(FrozenLinear):
        def input_gradient(self, dy: Tensor) -> Tensor:
            raise AssertionError

    ys = lora.lora_linears(own.x.detach(), [Forward(w) for w in own.weights], own.parts)
    torch.autograd.backward(ys, own.upstream)
    for i, part in enumerate(own.parts):
        for name in NAMES[:3]:
            if getattr(part, name) is not None:
                assert torch.equal(getattr(part, name).grad.cpu().double(), expected[f"{name}{i}"])


def test_strided_input_and_upstream_gradient(fresh_seed) -> None:
    """As a transposed activation and an expanded gradient (of a sum) are."""
    group = draw(Case(dora=(1,)), fresh_seed)
    upstream = [torch.ones(1, 1, dtype=torch.float64).expand_as(dy) for dy in group.upstream]
    strided = replace(group, x=group.x.T.contiguous().T, upstream=upstream)
    found = run(lora.lora_linears, strided, torch.float32, torch.float32)
    check_close(found, exact(strided))


def test_an_output_that_is_not_used(fresh_seed) -> None:
    """Gives nothing to the gradient of the input."""
    group = draw(Case(dora=(1,)), fresh_seed)
    upstream = [group.upstream[0], *(torch.zeros_like(dy) for dy in group.upstream[1:])]
    truth = exact(replace(group, upstream=upstream))
    own = group.leaves(torch.float32, torch.float32)
    y, *_ = lora.lora_linears(own.x, own.frozen, own.parts)
    y.backward(own.upstream[0])
    assert relative(own.x.grad.cpu().double(), truth["x"]) < 1e-5
    assert not own.parts[1].a.grad.any()


UNSUPPORTED = [
    pytest.param("float64", id="float64"),
    pytest.param("rank", id="a rank above what registers hold"),
    pytest.param("tokens", id="no tokens"),
    pytest.param("mask", id="a mask that is a list"),
    pytest.param("four", id="four projections"),
]


@pytest.mark.parametrize("change", UNSUPPORTED)
def test_what_is_left_to_others(change) -> None:
    changes = {"rank": {"ranks": (2, 2, 129)}, "tokens": {"tokens": 0}}
    changes["four"] = {"widths": (8,) * 4, "ranks": (2,) * 4}
    dtype = torch.float64 if change == "float64" else torch.float32
    own = draw(Case(**changes.get(change, {})), 0).leaves(dtype, torch.float32)
    parts = own.parts
    if change == "mask":
        listed = draw_mask((20, 40), 0.3, torch.device("cpu"))
        parts = [replace(parts[0], mask=listed), *parts[1:]]
    assert not linear_launch.supports(own.x, parts)
    if change != "mask":  # which is drawn on a CPU alone
        ys = lora.lora_linears(own.x, own.frozen, parts)
        torch.testing.assert_close(list(ys), definition(own.x, own.frozen, parts))


def test_a_base_weight_that_is_trained_is_refused() -> None:
    own = draw(Case(), 0).leaves(torch.float32, torch.float32)
    own.weights[1].requires_grad_()
    with pytest.raises(ValueError, match="must be frozen"):
        lora.lora_linears(own.x, own.frozen, own.parts)


@pytest.mark.parametrize(
    "sizes",
    [(32, 16), *(pytest.param(s, marks=pytest.mark.slow) for s in ((16, 64), (64, 32)))],
    ids=str,
)
def test_block_sizes_do_not_matter(fresh_seed, monkeypatch, sizes) -> None:
    monkeypatch.setattr(linear_launch, "tiles", lambda *_: (*sizes, 4, 1))
    group = draw(Case(dora=(1,)), fresh_seed)
    check_close(run(lora.lora_linears, group, torch.float32, torch.float32), exact(group))


@BOTH
@pytest.mark.parametrize("dora", [(), (0,)], ids=["LoRA", "DoRA"])
def test_compiled_as_one_graph(fresh_seed, steps, dora) -> None:
    """Outputs and gradients as without the compiler."""
    group = draw(Case(**ONE, dora=dora, masked=(0,)), fresh_seed)
    torch.compiler.reset()

    def compiled(*args):
        return torch.compile(lora.lora_linears, backend="aot_eager", fullgraph=True)(*args)

    expected = run(lora.lora_linears, group, torch.float32, torch.float32)
    found = run(compiled, group, torch.float32, torch.float32)
    check_close(found, expected)


def run_script(name: str, *args: str) -> str:
    """What a script of `tests/support` prints, in a process where Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / name
    done = subprocess.run(
        [sys.executable, str(script), *args], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_compiler_sees_the_kernels() -> None:
    """Each as one operator, as often as a pass launches them."""
    graphs = [ast.literal_eval(line) for line in run_script("triton_trace_linear.py").splitlines()]
    own = [{n: c for n, c in graph.items() if n.startswith("mixlora.")} for graph in graphs]
    assert [sum(found.values()) for found in own] == [1, 2, 2, 3], "LoRA, DoRA: forward, backward"


@pytest.mark.parametrize(
    "cards",
    [
        pytest.param(["8.9"], id="the usual group, on a consumer card", marks=pytest.mark.slow),
        pytest.param(["8.0", "8.9", "9.0", "all"], id="every table", marks=pytest.mark.slow),
    ],
)
def test_launches_compile_within_a_card(cards, tmp_path, monkeypatch) -> None:
    """Without a GPU: shared memory fits, and no thread spills more than a few registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = run_script("triton_compile_linear.py", *cards)
    assert "refused" not in found, found
    assert "fits" in found
