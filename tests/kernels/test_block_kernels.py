"""The block by its definition, and every kernel against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels import (
    KERNELS,
    Experts,
    FeedForward,
    Frozen,
    FrozenLinear,
    Projection,
    Routing,
    draw_mask,
    kernel,
    resolve_kernel,
    route,
)
from mixlora_exp.kernels.activations import activate
from mixlora_exp.kernels.mixlora import exact
from mixlora_exp.kernels.mixlora.reference import mixlora_reference


def relative(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth||, and the plain difference where the truth is zero."""
    return float((result - truth).norm() / truth.norm().clamp(min=1e-30))


def literal(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """One token at a time, each expert's weights written out as whole matrices."""

    def weight(projection: Projection, expert: int) -> Tensor:
        experts = projection.experts
        if experts is None:
            return projection.frozen.weight()
        full = projection.frozen.weight() + experts.scaling * experts.b[expert] @ experts.a[expert]
        if experts.magnitude is None:
            return full
        return (experts.magnitude[expert] / experts.norm[expert]).unsqueeze(-1) * full

    def apply(projection: Projection, expert: int, row: Tensor) -> Tensor:
        y = weight(projection, expert) @ row
        return y if projection.bias is None else y + projection.bias

    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for slot, expert in enumerate(routing.experts[token].tolist()):
            if routing.weights[token, slot] == 0:
                continue
            gate, up = (apply(p, expert, x[token]) for p in (block.gate, block.up))
            out = apply(block.down, expert, activate(gate, block.activation) * up)
            total = total + routing.weights[token, slot] * out
        rows.append(total)
    return torch.stack(rows)


def test_reference_is_the_definition_token_by_token(block_of, case, fresh_seed, same) -> None:
    block = block_of(case, fresh_seed)
    same(block.run("reference", torch.float64), block.run(literal, torch.float64))


def test_kernel_equals_reference_in_float64(block_of, case, form, fresh_seed, same) -> None:
    """Output and all gradients, for fresh inputs and a fresh upstream gradient."""
    block = block_of(case, fresh_seed)
    same(block.run(form, torch.float64), block.run("reference", torch.float64))


@pytest.fixture(scope="module")
def definition_of() -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The reference's results for a block in float64 and in given precisions, kept for the next
    kernel."""
    kept = {}

    def compute(block, seed, *dtypes):
        key = (repr(block.case), seed, dtypes)
        if key not in kept:
            kept[key] = block.run("reference", torch.float64), block.run("reference", *dtypes)
        return kept[key]

    return compute


def test_kernel_is_as_precise_as_the_reference(
    block_of, definition_of, case, compute, precision
) -> None:
    """Its error is at most twice the error that the definition makes in the same precision.

    Mean errors over five seeds: the ratio of two single errors is a matter of luck.
    """
    dtype, adapter_dtype = precision
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5):
        block = block_of(case, seed, dtype).rounded(dtype, adapter_dtype)
        truth, reference = definition_of(block, seed, dtype, adapter_dtype)
        results = block.run(compute, dtype, adapter_dtype)
        for name, result in results.items():
            if case.top_k == 1 and name == "router":
                # The weight is 1 whatever the router says: its gradient is rounding, no more.
                assert result.norm() < 1e-5 * truth["x"].norm()
                continue
            pair = relative(result, truth[name]), relative(reference[name], truth[name])
            errors.setdefault(name, []).append(pair)
    floor = torch.finfo(dtype).eps / 2
    for name, pairs in errors.items():
        error, allowed = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert error <= 2 * allowed + floor, (name, error, allowed)


def test_expert_without_tokens_gets_no_gradient(block_of, plain, form) -> None:
    block = block_of(replace(plain, pushed={2: -60.0}), 0)
    results = block.run(form, torch.float64)
    for role in ("gate", "up", "down"):
        for part in ("a", "b"):
            gradient = results[f"{role}.{part}"]
            assert (gradient[2] == 0).all()
            assert all(gradient[expert].abs().max() > 0 for expert in (0, 1, 3))


@pytest.mark.parametrize("tokens", [0, 1], ids=["no token", "a token without experts"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_without_a_filled_slot(block_of, plain, form, dora, tokens) -> None:
    """Every parameter still gets a gradient, which is zero."""
    block = block_of(replace(plain, tokens=tokens, empty=tokens > 0, dora=dora), 0)
    for compute in (form, "reference"):
        results = block.run(compute, torch.float64)
        assert results["y"].shape == (tokens, 12)
        assert all((result == 0).all() for result in results.values())


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_strided_input_and_upstream_gradient(block_of, plain, form, dora, same) -> None:
    """As a transposed activation and an expanded gradient (of a sum) are."""
    block = block_of(replace(plain, dora=dora), 0)
    strided = replace(
        block,
        upstream=torch.ones(1, 1, dtype=torch.float64).expand(9, 12),
        values={**block.values, "x": block.values["x"].T.contiguous().T},
    )
    assert not strided.values["x"].is_contiguous()
    whole = replace(block, upstream=torch.ones(9, 12, dtype=torch.float64))
    same(strided.run(form, torch.float64), whole.run("reference", torch.float64))


@pytest.mark.parametrize("role", ["gate", "up", "down"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_that_is_trained_gets_its_gradient(block_of, plain, role, part) -> None:
    """Whatever form the exact kernel takes, none is lost in silence."""
    block = block_of(replace(plain, biased=("gate", "up", "down"), dora=True), 0)
    found = []
    for compute in (exact.mixlora_exact, mixlora_reference):
        made = block.block(block.values, torch.float64, torch.float64)
        own = getattr(made, role)
        weight, bias = own.frozen.weight().clone(), own.bias.clone()
        trained = (weight if part == "weight" else bias).requires_grad_()
        projection = replace(own, frozen=FrozenLinear(weight, bias))
        routing = route(block.values["x"], block.values["router"], 2)
        compute(block.values["x"], routing, replace(made, **{role: projection})).sum().backward()
        found.append(trained.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


class Rounded(Frozen):
    """A weight held as int8 with a scale by row, made a matrix whenever it is used."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias, self.used = bias, 0
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.values = (weight / self.scale).round().to(torch.int8)

    def weight(self) -> Tensor:
        self.used += 1
        return self.values * self.scale


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_kernels_use_a_frozen_weight_through_its_object_alone(block_of, plain, form, dora) -> None:
    """As a quantised base will give it: the results of the matrix that it stands for."""
    case = replace(plain, dora=dora, biased=("gate", "down"))
    block = block_of(case, 0)
    results = []
    for held in (True, False):
        leaves = {name: v.clone().requires_grad_() for name, v in block.values.items()}
        made = block.block(leaves, torch.float64, torch.float64)
        for role, own in made.projections.items():
            frozen: Frozen = Rounded(own.frozen.weight(), own.bias)
            if not held:
                frozen = FrozenLinear(frozen.weight(), own.bias)
            made = replace(made, **{role: replace(own, frozen=frozen)})
        y = form(leaves["x"], block.route(leaves["x"], leaves["router"]), made)
        y.backward(block.upstream)
        results.append([y, *(leaf.grad for leaf in leaves.values())])
        assert not held or all(p.frozen.used > 1 for p in made.projections.values())
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_empty_slot_is_not_read(block_of, plain, exact_forms, form, dora) -> None:
    """It may name an expert that holds NaN, and gives its weight no gradient. The dense form
    multiplies every expert's columns, so it is spared the NaN but in DoRA's scale."""
    block = block_of(replace(plain, dora=dora, top_k=2), 0)
    broken = ["magnitude"] if form is exact_forms["exact, dense"] else ["a", "b", "magnitude"]
    experts = torch.tensor([0, 1]).repeat(9, 1)
    results = []
    for value in (0.0, float("nan")):
        leaves = {}
        for name, v in block.values.items():
            v = v.clone()
            if name.rpartition(".")[2] in broken:
                v[3] = value
            leaves[name] = v.requires_grad_()
        weights = torch.full((9, 2), 0.5, dtype=torch.float64)
        weights[:4, 0] = weights[3:6, 1] = 0.0
        weights.requires_grad_()
        chosen = torch.where(weights == 0, 3, experts)
        logits = torch.zeros(9, 4, dtype=torch.float64)
        made = block.block(leaves, torch.float64, torch.float64)
        y = form(leaves["x"], Routing(logits, logits, chosen, weights), made)
        y.backward(block.upstream)
        assert (weights.grad[weights == 0] == 0).all()
        assert (weights.grad[weights != 0] != 0).all()
        assert (y[3] == 0).all()
        gradients = {n: leaf.grad for n, leaf in leaves.items() if n != "router"}
        results.append({"y": y, **gradients})
    for name, found in results[1].items():
        assert torch.equal(found, results[0][name]), name


def test_kernel_names() -> None:
    assert resolve_kernel("auto") == "exact"
    for name in KERNELS:
        assert resolve_kernel(name) == name
    with pytest.raises(ValueError, match=r"kernel=fast is unknown.*auto.*exact.*reference"):
        resolve_kernel("fast")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="kernel 'exact' is registered twice"):
        kernel("exact")(exact.mixlora_exact)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_says_what_it_is(name) -> None:
    assert 20 < len(KERNELS[name].summary) < 90
    assert KERNELS[name].run.__doc__.strip().startswith(KERNELS[name].summary)


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [
        pytest.param("cuda", True, "triton", id="a GPU"),
        pytest.param("cuda", False, "exact", id="a GPU without Triton"),
        pytest.param("cpu", True, "exact", id="a CPU, where Triton is interpreted"),
        pytest.param("mps", True, "exact", id="another device"),
    ],
)
def test_kernel_that_auto_stands_for(monkeypatch, device, installed, expected) -> None:
    monkeypatch.setitem(KERNELS, "triton", replace(KERNELS["triton"], installed=installed))
    assert resolve_kernel("auto", device) == expected


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "dora", "grad", "form"),
    [
        pytest.param(1, 64, torch.bfloat16, False, False, "grouped", id="one token"),
        pytest.param(64, 2048, torch.bfloat16, False, False, "grouped", id="MixLoRA, wide"),
        pytest.param(64, 2048, torch.bfloat16, True, False, "dense", id="MixDoRA, wide"),
        pytest.param(63, 2048, torch.bfloat16, True, False, "grouped", id="few tokens"),
        pytest.param(64, 64, torch.bfloat16, True, False, "grouped", id="narrow"),
        pytest.param(64, 2048, torch.float32, True, False, "grouped", id="float32"),
        pytest.param(64, 2048, torch.bfloat16, True, True, "grouped", id="in training"),
    ],
)
def test_the_faster_form_is_taken(monkeypatch, tokens, width, dtype, dora, grad, form) -> None:
    """As measured in results/bench/forms-cpu.json."""
    projections = []
    for size_out, size_in in ((8, width), (8, width), (width, 8)):
        scale = torch.ones(2, size_out) if dora else None
        a, b = torch.zeros(2, 1, size_in), torch.zeros(2, size_out, 1)
        weight = torch.zeros(size_out, size_in, dtype=dtype)
        experts = Experts(a, b, 1.0, scale, scale)
        projections.append(Projection(FrozenLinear(weight), experts))
    x = torch.zeros(tokens, width, dtype=dtype)
    taken = []
    for name in ("grouped", "dense"):
        real = getattr(exact, f"{name}_stage")
        monkeypatch.setattr(
            exact,
            f"{name}_stage",
            lambda *inputs, name=name, real=real: (taken.append(name), real(*inputs))[1],
        )
    with torch.set_grad_enabled(grad):
        exact.mixlora_exact(
            x, route(x, torch.zeros(2, width), 1), FeedForward(*projections, "silu")
        )
    assert taken == [form]


@pytest.mark.parametrize("role", ["x_mask", "hidden_mask"])
def test_a_block_is_cut_with_the_one_mask_that_it_has(role) -> None:
    frozen = Projection(FrozenLinear(torch.zeros(4, 4)), None)
    mask = draw_mask((9, 4), 0.5, torch.device("cpu"))
    block = FeedForward(frozen, frozen, frozen, "silu", dropout=0.5, **{role: mask})
    part = block.slice(2, 5)
    assert torch.equal(getattr(part, role).kept(), mask.kept()[2:5])
    assert {part.x_mask, part.hidden_mask} == {getattr(part, role), None}


@pytest.mark.parametrize("form", ["exact, grouped", "exact, dense"])
def test_magnitude_gradients_in_bf16(exact_forms, block_of, plain, form) -> None:
    """Summed over 512 tokens in more than bf16: within 1 % of float64, in the mean of elements."""
    block = block_of(replace(plain, dora=True, tokens=512, hidden=32), 7)

    def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.bfloat16().double() for name, tensor in tensors.items()}

    block = replace(
        block, values=rounded(block.values), frozen=rounded(block.frozen),
        upstream=block.upstream.bfloat16().double(),
    )  # fmt: skip
    truth = block.run("reference", torch.float64)
    found = block.run(exact_forms[form], torch.bfloat16, torch.float32)
    for name in (n for n in truth if "magnitude" in n):
        error = (found[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 0.01, name
