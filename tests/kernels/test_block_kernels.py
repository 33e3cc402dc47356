"""The block by its definition, and the exact formulation against it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels import FeedForward, Projection, Routing, resolve_kernel, route
from mixlora_exp.kernels.exact import mixlora_exact
from mixlora_exp.kernels.reference import mixlora_reference


@pytest.fixture
def fresh_seed() -> int:
    """Another seed each time; pytest shows it when the test fails."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # noqa: T201
    return seed


def relative(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth||, and the plain difference where the truth is zero."""
    return float((result - truth).norm() / truth.norm().clamp(min=1e-30))


def literal(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """One token at a time, each expert's weights written out as whole matrices."""

    def weight(projection: Projection, expert: int) -> Tensor:
        experts = projection.experts
        if experts is None:
            return projection.weight
        full = projection.weight + experts.scaling * experts.b[expert] @ experts.a[expert]
        if experts.magnitude is None:
            return full
        return (experts.magnitude[expert] / experts.norm[expert]).unsqueeze(-1) * full

    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for slot, expert in enumerate(routing.experts[token].tolist()):
            gate, up = (weight(p, expert) @ x[token] for p in (block.gate, block.up))
            out = weight(block.down, expert) @ (block.activation(gate) * up)
            total = total + routing.weights[token, slot] * out
        rows.append(total)
    return torch.stack(rows)


def test_reference_is_the_definition_token_by_token(block_of, case, fresh_seed) -> None:
    block = block_of(case, fresh_seed)
    truth = block.run(literal, torch.float64)
    results = block.run("reference", torch.float64)
    assert results.keys() == truth.keys()
    for name, result in results.items():
        torch.testing.assert_close(result, truth[name], rtol=1e-9, atol=1e-10, msg=name)


def test_exact_equals_reference_in_float64(block_of, case, fresh_seed) -> None:
    """Output and all gradients, for fresh inputs and a fresh upstream gradient."""
    block = block_of(case, fresh_seed)
    truth = block.run("reference", torch.float64)
    results = block.run("exact", torch.float64)
    assert results.keys() == truth.keys()
    for name, result in results.items():
        torch.testing.assert_close(result, truth[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, id="bf16 base, float32 adapter, as trained"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16 throughout"),
    ],
)
def test_exact_is_as_precise_as_the_reference(block_of, case, dtype, adapter_dtype) -> None:
    """Its error is at most twice the error that the definition makes in the same precision.

    Mean errors over five seeds: the ratio of two single errors is a matter of luck.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5):
        block = block_of(case, seed, dtype).rounded(dtype, adapter_dtype)
        truth = block.run("reference", torch.float64)
        reference = block.run("reference", dtype, adapter_dtype)
        exact = block.run("exact", dtype, adapter_dtype)
        for name, result in exact.items():
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


@pytest.mark.parametrize("kernel", [mixlora_reference, mixlora_exact])
def test_expert_without_tokens_gets_no_gradient(block_of, plain, kernel) -> None:
    block = block_of(replace(plain, pushed={2: -60.0}), 0)
    results = block.run(kernel, torch.float64)
    for role in ("gate", "up", "down"):
        for part in ("a", "b"):
            gradient = results[f"{role}.{part}"]
            assert (gradient[2] == 0).all()
            assert all(gradient[expert].abs().max() > 0 for expert in (0, 1, 3))


def test_dropout_masks_the_input_of_gate_and_up_alike_in_both_kernels(block_of, plain) -> None:
    """Without experts on down the mask on x is the only one, so one seed gives both the same."""
    block = block_of(replace(plain, roles=("gate", "up")), 0)
    leaves = block.values
    outputs = []
    for kernel in (mixlora_reference, mixlora_exact):
        feed_forward = block.block(leaves, torch.float64, torch.float64, dropout=0.4)
        routing = route(leaves["x"], leaves["router"], 2)
        torch.manual_seed(5)
        outputs.append(kernel(leaves["x"], routing, feed_forward))
        mixed = kernel(leaves["x"], routing, replace(feed_forward, dropout=0.0))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(outputs[0], mixed)


@pytest.mark.parametrize("kernel", [mixlora_reference, mixlora_exact])
def test_dropout_spares_the_frozen_path(block_of, plain, kernel) -> None:
    """With B = 0 the low-rank branch adds nothing, so whatever is dropped the output stays."""
    block = block_of(plain, 0)
    leaves = {
        name: torch.zeros_like(value) if name.endswith(".b") else value
        for name, value in block.values.items()
    }
    routing = route(leaves["x"], leaves["router"], 2)
    dropped, whole = (
        kernel(leaves["x"], routing, block.block(leaves, torch.float64, torch.float64, dropout=p))
        for p in (0.5, 0.0)
    )
    assert torch.equal(dropped, whole)


@pytest.mark.parametrize("kernel", [mixlora_reference, mixlora_exact])
def test_a_token_with_nan_leaves_the_others_alone(block_of, plain, kernel) -> None:
    """A padding row may hold NaN."""
    block = block_of(plain, 0)
    x = block.values["x"].clone()
    x[3] = float("nan")
    feed_forward = block.block(block.values, torch.float64, torch.float64)
    outputs = [
        kernel(rows, route(rows, block.values["router"], 2), feed_forward)
        for rows in (block.values["x"], x)
    ]
    others = torch.arange(len(x)) != 3
    torch.testing.assert_close(outputs[1][others], outputs[0][others], rtol=1e-12, atol=1e-12)
    assert outputs[1][3].isnan().all()


def test_kernel_names() -> None:
    assert resolve_kernel("auto") == "exact"
    assert resolve_kernel("reference") == "reference"
    with pytest.raises(ValueError, match=r"kernel=fast is unknown.*reference.*exact"):
        resolve_kernel("fast")
