"""The kernels under dropout: the same masks give the same numbers, whatever form they have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixlora_exp.kernels import route
from mixlora_exp.kernels.mixlora.peft import mixlora_peft
from mixlora_exp.kernels.mixlora.reference import mixlora_reference


def test_kernel_equals_reference_under_the_same_masks(
    block_of, case, compute, fresh_seed, same, held
) -> None:
    block = block_of(case, fresh_seed)
    masks = block.masks(0.4)
    given = masks if held == "sparse" else masks.as_bool()
    assert given.x.is_sparse == given.hidden.is_sparse == (held == "sparse")
    results = block.run(compute, torch.float64, masks=given)
    same(results, block.run("reference", torch.float64, masks=masks))


@pytest.mark.parametrize("masked", ["x", "hidden"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_one_mask_alone(block_of, plain, masked_form, fresh_seed, same, masked, dora) -> None:
    """Where only gate and up, or only down, have experts, one mask is None."""
    block = block_of(replace(plain, dora=dora), fresh_seed)
    masks = replace(block.masks(0.4), **{"hidden" if masked == "x" else "x": None})
    results = block.run(masked_form, torch.float64, masks=masks)
    truth = block.run("reference", torch.float64, masks=masks)
    same(results, truth)
    assert not torch.allclose(truth["y"], block.run("reference", torch.float64)["y"])


def literal(block, masks, leaves, routing):
    """The definition with masked whole matrices: `W x + s B A (mask * x)`, token by token."""
    x_kept = masks.x.kept().double() * masks.x.scale
    hidden_kept = masks.hidden.kept().double() * masks.hidden.scale
    rows = []
    for token in range(block.case.tokens):
        total = 0
        for slot, expert in enumerate(routing.experts[token].tolist()):

            def project(role, value, kept, expert=expert):
                a, b = leaves[f"{role}.a"][expert], leaves[f"{role}.b"][expert]
                y = block.frozen[role] @ value + block.scaling * b @ a @ (kept * value)
                if not block.case.dora:
                    return y
                return leaves[f"{role}.magnitude"][expert] / block.norms[role][expert] * y

            x = leaves["x"][token]
            gate = project("gate", x, x_kept[token])
            hidden = torch.nn.functional.silu(gate) * project("up", x, x_kept[token])
            out = project("down", hidden, hidden_kept[token])
            total = total + routing.weights[token, slot] * out
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_reference_drops_the_input_of_the_low_rank_branches(
    block_of, plain, fresh_seed, dora
) -> None:
    """One mask on x for gate and up, one on the hidden state for all slots of a token."""
    block = block_of(replace(plain, dora=dora), fresh_seed)
    masks = block.masks(0.4)
    routing = route(block.values["x"], block.values["router"], 2)
    feed_forward = block.block(block.values, torch.float64, torch.float64, masks=masks)
    y = mixlora_reference(block.values["x"], routing, feed_forward)
    torch.testing.assert_close(y, literal(block, masks, block.values, routing))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="LoRA"),
        pytest.param({"dora": True}, id="DoRA"),
        pytest.param({"roles": ("down",)}, id="down only"),
        pytest.param({"tokens": 70}, id="rounded rows"),
    ],
)
def test_precision_under_dropout(block_of, plain, masked_form, changes) -> None:
    """bf16 as trained, where an expert's rows are rounded up: at most twice the definition's
    error (means over five seeds)."""
    dtypes = torch.bfloat16, torch.float32
    errors: dict[str, list[torch.Tensor]] = {}
    for seed in range(5):
        block = block_of(replace(plain, **changes), seed, torch.bfloat16).rounded(*dtypes)
        torch.manual_seed(seed)
        masks = block.masks(0.3)
        truth = block.run("reference", torch.float64, masks=masks)
        made = [block.run(k, *dtypes, masks=masks) for k in (masked_form, "reference")]
        for name, exact in truth.items():
            pair = [(results[name] - exact).norm() / exact.norm() for results in made]
            errors.setdefault(name, []).append(torch.stack(pair))
    for name, pairs in errors.items():
        error, allowed = torch.stack(pairs).mean(dim=0).tolist()
        assert error <= 2 * allowed + 0.002, (name, error, allowed)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_dropout_spares_the_frozen_path(block_of, plain, masked_form, dora) -> None:
    """With B = 0 the low-rank branch adds nothing, so whatever is dropped the output stays."""
    block = block_of(replace(plain, dora=dora), 0)
    zero = {
        name: torch.zeros_like(value) if name.endswith(".b") else value
        for name, value in block.values.items()
    }
    block = replace(block, values=zero)
    masks = block.masks(0.5)
    dropped = block.run(masked_form, torch.float64, masks=masks)
    whole = block.run(masked_form, torch.float64)
    assert torch.equal(dropped["y"], whole["y"])
    # Not so the gradient of B, which is that of a dropped input.
    assert not torch.allclose(dropped["gate.b"], whole["gate.b"])
    assert not torch.allclose(dropped["down.b"], whole["down.b"])


def test_probability_alone_does_nothing_where_masks_are_taken(block_of, plain, masked_form) -> None:
    """`dropout` is for `peft`, which draws by itself; the others must not drop twice."""
    block = block_of(plain, 0)
    routing = route(block.values["x"], block.values["router"], 2)
    outputs = [
        masked_form(
            block.values["x"],
            routing,
            block.block(block.values, torch.float64, torch.float64, dropout=p),
        )
        for p in (0.0, 0.4)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_peft_draws_its_own(block_of, plain, dora) -> None:
    """From the default generator and with the others' mean: over many draws the output of a block
    whose down projection alone has experts (it is linear in the mask) is that without dropout."""
    block = block_of(replace(plain, dora=dora, roles=("down",)), 0)
    routing = route(block.values["x"], block.values["router"], 2)

    def run(p: float) -> torch.Tensor:
        feed_forward = block.block(block.values, torch.float64, torch.float64, dropout=p)
        return mixlora_peft(block.values["x"], routing, feed_forward)

    torch.manual_seed(0)
    first = run(0.3)
    assert not torch.allclose(run(0.3), first)
    torch.manual_seed(0)
    assert torch.equal(run(0.3), first)
    draws = torch.stack([run(0.3) for _ in range(400)])
    error = (draws.mean(dim=0) - run(0.0)).abs()
    assert (error <= 6 * draws.std(dim=0) / 400**0.5).all()
