"""LoRA and DoRA of one layer, fused: against the definition."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from one_lora import by_itself
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixlora_exp.kernels import DropMask, draw_mask, plain_linear
from mixlora_exp.kernels.lora_many import lora_add, lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart

SCALING = 1.7
NAMES = ("x", "a", "b", "magnitude")


def draw(tokens: int, size: tuple[int, int], rank: int, dora: bool) -> dict[str, Tensor]:
    """Values in float64, an upstream gradient among them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inner, outer = size
    values = {
        "x": normal(tokens, inner),
        "weight": normal(outer, inner) / inner**0.5,
        "a": normal(rank, inner) / inner**0.5,
        "b": normal(outer, rank) / rank**0.5,
        "upstream": normal(tokens, outer),
    }
    if dora:
        values["norm"] = (values["weight"] + SCALING * values["b"] @ values["a"]).norm(dim=-1)
        values["magnitude"] = values["norm"] * (1 + 0.3 * normal(outer))
    return values


def definition(x: Tensor, weight: Tensor, part: LowRankPart) -> Tensor:
    return lora_add_reference(x @ weight.T, x, part)


def run(
    compute: Callable,
    values: dict[str, Tensor],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    mask: DropMask | None,
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    base = ("x", "weight", "upstream")
    cast = {n: v.to(dtype if n in base else adapter_dtype, copy=True) for n, v in values.items()}
    leaves = {name: cast[name].requires_grad_() for name in NAMES if name in cast}
    own = (cast["a"], cast["b"], SCALING, cast.get("magnitude"), cast.get("norm"), mask)
    y = compute(cast["x"], cast["weight"], LowRankPart(*own))
    assert y.dtype == dtype
    y.backward(cast["upstream"])
    found = {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    assert all(found[name].dtype == leaf.dtype for name, leaf in leaves.items())
    return {name: value.double() for name, value in found.items()}


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def dora(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize(
    ("tokens", "size", "rank"),
    [
        pytest.param(9, (12, 20), 2, id="wider out than in"),
        pytest.param(9, (20, 12), 10, id="rank 10"),
        pytest.param(5, (7, 13), 32, id="rank above both sizes"),
        pytest.param(1, (12, 20), 2, id="one token"),
        pytest.param(0, (12, 20), 2, id="no token"),
    ],
)
@pytest.mark.parametrize("held", ["no mask", "sparse", "bool", "p > 0.5"])
def test_equals_the_definition(fresh_seed, tokens, size, rank, dora, held) -> None:
    values = draw(tokens, size, rank, dora)
    p = {"no mask": 0.0, "p > 0.5": 0.7}.get(held, 0.4)
    mask = draw_mask((tokens, size[0]), p, torch.device("cpu"))
    if held == "bool":
        mask = DropMask(mask.kept(), mask.scale, mask.shape)
    dtypes = torch.float64, torch.float64
    found = run(by_itself, values, *dtypes, mask)
    truth = run(definition, values, *dtypes, mask)
    assert found.keys() == truth.keys() == {"y", *NAMES[: 3 + dora]}
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scaling", [0.3, 1.7])
def test_the_form_of_other_devices_is_the_definition(
    fresh_seed, dora, scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose products have no factor until the last: below and above 1."""
    monkeypatch.setattr("mixlora_exp.kernels.lora.steps_on", lambda device: plain_linear)
    monkeypatch.setitem(globals(), "SCALING", scaling)
    values = draw(9, (12, 20), 3, dora)
    mask = draw_mask((9, 12), 0.4, torch.device("cpu"))
    dtypes = torch.float64, torch.float64
    found, truth = (run(form, values, *dtypes, mask) for form in (by_itself, definition))
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-10)


def test_definition_in_whole_matrices(fresh_seed, dora) -> None:
    """`m / ||W + s B A|| (W x + s B A drop(x))`: the reference is nothing else."""
    values = draw(9, (12, 20), 3, dora)
    mask = draw_mask((9, 12), 0.4, torch.device("cpu"))
    y = run(definition, values, torch.float64, torch.float64, mask)["y"]
    delta = SCALING * values["b"] @ values["a"]
    dropped = values["x"] * mask.kept() * mask.scale
    expected = values["x"] @ values["weight"].T + dropped @ delta.T
    if dora:
        expected = expected * values["magnitude"] / (values["weight"] + delta).norm(dim=-1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, id="bf16 base, float32 adapter, as trained"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16 throughout"),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_is_as_precise_as_the_definition(dtype, adapter_dtype, dora, p) -> None:
    """Its error is at most twice the definition's in the same precision, in the mean."""
    errors: dict[str, list[Tensor]] = {}
    for seed in range(5):
        torch.manual_seed(seed)
        values = draw(40, (24, 36), 10, dora)
        for name, value in values.items():
            kind = dtype if name in ("x", "weight", "upstream") else adapter_dtype
            values[name] = value.to(kind).double()
        mask = draw_mask((40, 24), p, torch.device("cpu"))
        truth = run(definition, values, torch.float64, torch.float64, mask)
        made = [
            run(compute, values, dtype, adapter_dtype, mask) for compute in (by_itself, definition)
        ]
        for name, exact in truth.items():
            pair = [(results[name] - exact).norm() / exact.norm() for results in made]
            errors.setdefault(name, []).append(torch.stack(pair))
    floor = torch.finfo(dtype).eps / 2
    for name, pairs in errors.items():
        error, allowed = torch.stack(pairs).mean(dim=0).tolist()
        assert error <= 2 * allowed + floor, (name, error, allowed)


def test_input_that_needs_no_gradient(fresh_seed, dora) -> None:
    """As in the first layer: the adapters' gradients are the same."""
    values = draw(9, (12, 20), 3, dora)
    whole = run(by_itself, values, torch.float64, torch.float64, None)
    leaves = {name: values[name].clone().requires_grad_() for name in NAMES[1:] if name in values}
    own = (leaves["a"], leaves["b"], SCALING, leaves.get("magnitude"), values.get("norm"))
    y = by_itself(values["x"], values["weight"], LowRankPart(*own))
    y.backward(values["upstream"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-12, atol=1e-12)


CPU = torch.device("cpu")


def draw_several(count: int, tokens: int, size: tuple[int, int], rank: int, dora: bool, p: float):
    """Leaves in float64 and the parts they make; every other adapter has no dropout."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    frozen, x = leaf(count * tokens, size[1]), leaf(count * tokens, size[0])
    parts = []
    for number in range(count):
        drawn = p if number % 2 == 0 else 0.0
        parts.append(
            LowRankPart(
                leaf(rank, size[0]),
                leaf(size[1], rank),
                0.5 + number,
                leaf(size[1]) if dora else None,
                torch.rand(size[1], dtype=torch.float64) + 0.5 if dora else None,
                draw_mask((tokens, size[0]), drawn, CPU),
            )
        )
    return frozen, x, parts


def leaves_of(frozen, x, parts):
    own = [t for part in parts for t in (part.a, part.b, part.magnitude) if t is not None]
    return [frozen, x, *own]


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.7], ids=["no dropout", "sparse", "bool"])
@pytest.mark.parametrize(("count", "tokens"), [(1, 5), (2, 7), (4, 3), (3, 1), (2, 0)])
def test_is_each_adapter_by_itself(fresh_seed, count, tokens, dora, p) -> None:
    torch.manual_seed(fresh_seed)
    frozen, x, parts = draw_several(count, tokens, (12, 20), 3, dora, p)
    y = lora_add(frozen, x, *parts)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves_of(frozen, x, parts), upstream)
    shares = zip(frozen.tensor_split(count), x.tensor_split(count), parts, strict=True)
    expected = torch.cat([lora_add_reference(*share) for share in shares])
    truth = torch.autograd.grad(expected, leaves_of(frozen, x, parts), upstream)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_nothing_leaks_from_an_adapter_with_nan(fresh_seed, dora) -> None:
    """Neither into the others' outputs nor into their gradients, by a bit."""
    torch.manual_seed(fresh_seed)
    frozen, x, parts = draw_several(3, 5, (12, 20), 2, dora, 0.3)
    results = []
    for broken in (False, True):
        if broken:
            with torch.no_grad():
                parts[1].a.fill_(float("nan"))
        y = lora_add(frozen, x, *parts)
        own = leaves_of(frozen, x, [parts[0], parts[2]])
        results.append([y, *torch.autograd.grad(y.sum(), own)])
    (y, dfrozen, dx, *sound), (bad_y, bad_dfrozen, bad_dx, *others) = results
    assert bad_y[5:10].isnan().any()
    for one, other in ((y, bad_y), (dfrozen, bad_dfrozen), (dx, bad_dx)):
        assert torch.equal(one[:5], other[:5])
        assert torch.equal(one[10:], other[10:])
    assert all(torch.equal(one, other) for one, other in zip(sound, others, strict=True))


def test_in_the_base_s_precision(fresh_seed) -> None:
    """bf16 rows and float32 adapters, as trained: gradients come back in each one's own."""
    torch.manual_seed(fresh_seed)
    frozen, x, parts = draw_several(2, 6, (12, 20), 3, True, 0.0)
    rounded = [
        LowRankPart(
            part.a.detach().float().requires_grad_(),
            part.b.detach().float().requires_grad_(),
            part.scaling,
            part.magnitude.detach().float().requires_grad_(),
            part.norm.float(),
            None,
        )
        for part in parts
    ]
    y = lora_add(frozen.detach().bfloat16(), x.detach().bfloat16(), *rounded)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    for part in rounded:
        assert {t.grad.dtype for t in (part.a, part.b, part.magnitude)} == {torch.float32}
    exact = lora_add(frozen, x, *parts)
    # Ten roundings lie between a factor and the sum, and terms of both signs may cancel: the bound
    # is that many half units in the last place of the sum of the terms' absolute values.
    whole = [
        LowRankPart(p.a.abs(), p.b.abs(), p.scaling, p.magnitude.abs(), p.norm, None) for p in parts
    ]
    bound = 10 * torch.finfo(torch.bfloat16).eps / 2 * lora_add(frozen.abs(), x.abs(), *whole)
    assert ((y.double() - exact).abs() <= bound).all()


def test_a_checkpointed_pass_keeps_no_mask() -> None:
    """What is computed again need not be kept meanwhile."""
    frozen, x, parts = draw_several(2, 50, (12, 20), 2, False, 0.5)
    seen = []

    def run(frozen, x):
        drawn = [
            LowRankPart(p.a, p.b, p.scaling, None, None, draw_mask((50, 12), 0.7, CPU))
            for p in parts
        ]
        seen.extend(weakref.ref(part.mask.elements) for part in drawn)
        return lora_add(frozen, x, *drawn)

    y = checkpoint(run, frozen, x, use_reentrant=False, preserve_rng_state=True)
    gc.collect()
    assert len(seen) == 2
    assert not any(ref() is not None for ref in seen)
    y.sum().backward()
