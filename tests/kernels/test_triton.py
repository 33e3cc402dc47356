"""The Triton kernels: compiled on a GPU, elsewhere by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_cases import (
    DEVICE,
    GPU,
    fused,
    on_device,
    triton_block,
    triton_columns,
    triton_hidden,
    triton_router,
    triton_scaled,
    triton_tiles,
)

from mixlora_exp.kernels import DropMask, route
from mixlora_exp.kernels.shapes import ROLES, Low

# The interpreter's bf16 products are wrong on a CPU.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result - truth).norm() / truth.norm().clamp(min=1e-30))


GELU = torch.nn.functional.gelu
CASES = [
    pytest.param({}, id="plain"),
    pytest.param(
        {"tokens": 40, "hidden": 40, "inner": 72},
        id="several tiles and splits",
        marks=pytest.mark.slow,
    ),
    pytest.param({"tokens": 1}, id="one token, as in generation"),
    pytest.param({"hidden": 7, "inner": 13}, id="odd sizes, below a tile"),
    pytest.param({"tokens": 17, "hidden": 17, "inner": 33}, id="odd sizes, one above a tile"),
    pytest.param({"experts": 1, "top_k": 1}, id="one expert"),
    pytest.param({"experts": 9, "top_k": 3, "rank": 8}, id="E and K no powers of two, rank 8"),
    pytest.param({"experts": 3, "top_k": 3}, id="K=E, no expert is left out"),
    pytest.param(
        {"experts": 8, "top_k": 8, "rank": 16},
        id="all of eight, as in a soft mixture",
        marks=pytest.mark.slow,
    ),
    pytest.param({"top_k": 1, "tokens": 20, "rank": 16}, id="K=1, rank 16 needs no padding"),
    pytest.param({"pushed": {2: -60.0}}, id="an expert without tokens"),
    pytest.param({"pushed": {1: 60.0}, "top_k": 1}, id="all tokens to one expert"),
    pytest.param({"rank": 24}, id="rank 24, padded to 32, above the hidden size"),
    pytest.param({"activation": GELU}, id="GeGLU by erf"),
    pytest.param(
        {"activation": lambda x: GELU(x, approximate="tanh")}, id="GeGLU by tanh, as in Gemma"
    ),
    pytest.param({"roles": ("gate",)}, id="experts on gate only, none to reduce h for"),
    pytest.param({"roles": ("up", "down")}, id="experts on up and down, P of one side"),
    pytest.param({"roles": ("down",)}, id="experts on down only, no P"),
    pytest.param({"dora": True}, id="DoRA everywhere"),
    pytest.param({"dora": True, "roles": ("down",)}, id="DoRA on down only, h per slot"),
    pytest.param({"dora": True, "roles": ("gate", "up")}, id="DoRA without down, h mixed"),
    pytest.param(
        {"dora": True, "experts": 5, "top_k": 3, "tokens": 20, "hidden": 40, "inner": 40},
        id="DoRA, E and K no powers of two, several tiles",
    ),
    pytest.param({"dora": True, "pushed": {2: -60.0}}, id="DoRA, an expert without tokens"),
    pytest.param({"dora": True, "roles": ("gate", "down"), "top_k": 1}, id="DoRA, not on up, K=1"),
    pytest.param({"biased": ROLES, "normalised": False}, id="bias, weights that do not sum to 1"),
    pytest.param({"biased": ROLES, "dora": True, "inner": 33}, id="DoRA and bias"),
    pytest.param({"biased": ("up",), "roles": ("down",)}, id="bias on up, experts on down only"),
    pytest.param({"empty": True, "biased": ROLES}, id="tokens with fewer experts than K"),
    pytest.param({"empty": True, "dora": True, "top_k": 3}, id="the same with DoRA"),
    pytest.param({"tokens": 1, "empty": True, "dora": True}, id="a token without experts"),
    pytest.param(
        {"tokens": 200, "experts": 8, "inner": 16}, id="200 tokens", marks=pytest.mark.slow
    ),
]


def names_to_judge(case, results: dict[str, Tensor]) -> list[str]:
    """With K = 1 the weight is 1 whatever the router says: its gradient is rounding, no more."""
    return [name for name in results if not (case.top_k == 1 and name == "router")]


def check_close(block, masks=None) -> None:
    """In float32, output and every gradient against the reference in float64."""
    truth = block.run("reference", torch.float64, masks=masks)
    results = block.run(fused, torch.float32, masks=masks)
    assert results.keys() == truth.keys()
    for name in names_to_judge(block.case, results):
        assert relative(results[name], truth[name]) < 5e-5, name


@pytest.mark.parametrize("options", CASES)
def test_fresh_inputs(block_of, plain, options, fresh_seed) -> None:
    """Output and every gradient under dropout, for new inputs each time."""
    block = block_of(replace(plain, **options), fresh_seed, torch.float32)
    check_close(block, block.masks(0.3, hashed=True))


PRECISE = [
    pytest.param({}, id="LoRA"),
    pytest.param({"tokens": 1, "hidden": 40}, id="one token"),
    pytest.param({"dora": True, "biased": ROLES}, id="DoRA and bias"),
]


# In float32, `test_fresh_inputs` bounds the error of every case: one is enough here.
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{dtype}-{case.id}")
        for dtype in DTYPES
        for case in (PRECISE[-1:] if dtype is torch.float32 else PRECISE)
    ],
)
def test_as_precise_as_the_reference(block_of, plain, options, dtype) -> None:
    """Output and every gradient under dropout: the error is at most twice that of the definition in
    the same precision.

    On the mean over a few inputs: the ratio of two single errors is a matter of luck.
    """
    case = replace(plain, **options)
    torch.manual_seed(0)
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(2 if case.tokens > 1 else 4):
        block = block_of(case, seed, dtype).rounded(dtype, torch.float32)
        masks = block.masks(0.3, hashed=True)
        truth = block.run("reference", torch.float64, masks=masks)
        reference = block.run("reference", dtype, torch.float32, masks)
        results = block.run(fused, dtype, torch.float32, masks)
        for name in names_to_judge(case, results):
            pair = relative(results[name], truth[name]), relative(reference[name], truth[name])
            errors.setdefault(name, []).append(pair)
    floor = torch.finfo(dtype).eps / 2
    for name, pairs in errors.items():
        error, allowed = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert error <= 2 * allowed + floor, (name, error, allowed)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(("rows", "inner"), [(16, 16), (32, 64)], ids=["small", "larger"])
def test_block_sizes_do_not_matter(
    block_of, plain, monkeypatch, fresh_seed, rows, inner, dora
) -> None:
    chosen = triton_tiles.Tiles(rows, inner)
    for module in (triton_columns, triton_hidden, triton_scaled):
        monkeypatch.setattr(module, "tiles_of", lambda kernel, *_, **__: chosen)
    block = block_of(replace(plain, tokens=20, inner=40, dora=dora), fresh_seed, torch.float32)
    check_close(block, block.masks(0.3, hashed=True))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_forms_at_hand_are_taken_for_the_parameters(block_of, plain, dora) -> None:
    """The parameters themselves are not read where `Experts.low` has their forms; the gradients
    are theirs all the same, contiguous and in their dtype."""
    block = block_of(replace(plain, dora=dora), 0, torch.float16).rounded(
        torch.float16, torch.float16
    )
    leaves = {n: v.to(DEVICE, torch.float32) for n, v in block.values.items()}
    made = on_device(block.block(leaves, torch.float16, torch.float32))
    x, found = leaves["x"].half(), []
    for broken in (False, True):
        sides, wanted = {}, []
        for role, projection in made.projections.items():
            own = projection.experts
            scale = (own.magnitude / own.norm).half() if dora else None
            low = Low(own.a.half(), own.b.half(), scale)
            a, b = (
                torch.full_like(t, float("nan") if broken else 0.0) if broken else t.clone()
                for t in (own.a, own.b)
            )
            wanted += [a.requires_grad_(), b.requires_grad_()]
            experts = replace(own, a=a, b=b, low=low)
            sides[role] = replace(projection, experts=experts)
        routing = block.route(x.float(), leaves["router"])
        y = triton_block.fused_block(x, routing, replace(made, **sides))
        gradients = torch.autograd.grad(y, wanted, torch.ones_like(y))
        assert all(g.is_contiguous() and g.dtype == torch.float32 for g in gradients)
        found.append([y, *gradients])
    for sound, other in zip(*found, strict=True):
        assert torch.equal(sound, other)


@pytest.mark.parametrize("masked", ["x", "hidden"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_one_mask_alone(block_of, plain, fresh_seed, masked, dora) -> None:
    block = block_of(replace(plain, dora=dora), fresh_seed, torch.float32)
    masks = replace(block.masks(0.4, hashed=True), **{"hidden" if masked == "x" else "x": None})
    check_close(block, masks)


@pytest.mark.slow
def test_each_input_may_ask_for_a_gradient_alone(block_of, plain) -> None:
    """And gets the one that it has beside all others."""
    case = replace(plain, tokens=3, dora=True, biased=ROLES, normalised=False)
    block = block_of(case, 0, torch.float32)
    expected = block.run(fused, torch.float32)
    for needed in block.values:
        leaves = {n: v.float().requires_grad_(n == needed) for n, v in block.values.items()}
        made = block.block(leaves, torch.float32, torch.float32)
        y = fused(leaves["x"], block.route(leaves["x"], leaves["router"]), made)
        y.backward(block.upstream.float())
        assert [n for n, leaf in leaves.items() if leaf.grad is not None] == [needed]
        assert torch.equal(leaves[needed].grad.double(), expected[needed]), needed


def test_strided_input_and_upstream_gradient(block_of, plain) -> None:
    """As a transposed activation and an expanded gradient (of a sum) are."""
    block = block_of(plain, 0, torch.float32)
    strided = block.values["x"].T.contiguous().T
    upstream = torch.ones(1, 1, dtype=torch.float64).expand(9, 12)
    assert not strided.is_contiguous()
    check_close(replace(block, upstream=upstream, values={**block.values, "x": strided}))


def test_what_is_kept_does_not_grow_with_k(block_of, plain) -> None:
    """But for the routing, its order and R columns per row."""
    kept = {}
    for top_k in (1, 4):
        block = block_of(replace(plain, tokens=16, top_k=top_k), 0, torch.float32)
        sizes: dict[int, int] = {}

        def pack_hook(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = {name: v.float().requires_grad_() for name, v in block.values.items()}
        routing = route(leaves["x"], leaves["router"], top_k)
        feed_forward = block.block(leaves, torch.float32, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            fused(leaves["x"], routing, feed_forward)
        kept[top_k] = sum(sizes.values())
    # Per row the routing's 8 + 4 bytes, the 5 numbers of 4 bytes of the order and R columns of P
    # of two sides and of A h.
    assert 0 < kept[4] - kept[1] <= 16 * 3 * (8 + 4 + 5 * 4 + 3 * 2 * 4)


def test_autocast_changes_nothing_inside(block_of, plain) -> None:
    block = block_of(plain, 0, torch.float32)
    outside = block.run(fused, torch.float32)

    def inside(*args) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return fused(*args)

    for name, result in block.run(inside, torch.float32).items():
        assert torch.equal(result, outside[name]), name


UNSUPPORTED = [
    pytest.param({}, torch.float64, "", id="float64"),
    pytest.param({"activation": torch.tanh}, torch.float32, "", id="unknown activation"),
    pytest.param({"rank": 80}, torch.float32, "", id="256 columns of two slots in float32"),
    pytest.param({"rank": 130}, torch.float16, "", id="512 columns of two slots"),
    pytest.param({}, torch.float32, "mask", id="a mask that is no hash"),
    pytest.param({"tokens": 0}, torch.float32, "", id="no tokens"),
    pytest.param({}, torch.float32, "trained", id="a base weight that is trained"),
    pytest.param({"biased": ROLES}, torch.float32, "trained bias", id="a bias that is trained"),
    pytest.param({}, torch.float32, "ranks", id="ranks that differ"),
]


@pytest.mark.parametrize(("options", "dtype", "change"), UNSUPPORTED)
def test_the_rest_is_left_to_the_dense_form(
    block_of, plain, exact_forms, options, dtype, change
) -> None:
    block = block_of(replace(plain, **options), 0, dtype)
    results = []
    for kernel in (triton_block.fused_block, exact_forms["exact, dense"]):
        leaves = {
            name: v.to(DEVICE, dtype, copy=True).requires_grad_()
            for name, v in block.values.items()
        }
        made = block.block(leaves, dtype, dtype)
        made = on_device(made)
        weight = made.up.frozen.weight().requires_grad_(change == "trained")
        if change == "trained bias":
            made.up.bias.requires_grad_()
        if change == "ranks":
            experts = made.up.experts
            cut = replace(experts, a=experts.a[:, :1], b=experts.b[:, :, :1])
            made = replace(made, up=replace(made.up, experts=cut))
        if change == "mask":
            kept = torch.ones(9, 12, dtype=torch.bool, device=DEVICE).tril()
            made = replace(made, x_mask=DropMask(kept, 1.5, (9, 12)))
        routing = route(leaves["x"], leaves["router"], 2)
        assert not triton_block.supports(leaves["x"], routing, made)
        y = kernel(leaves["x"], routing, made)
        y.sum().backward()
        grads = [leaf.grad for leaf in leaves.values()]
        results.append([y, *grads, *([weight.grad] if change == "trained" else [])])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_what_is_slower_for_its_size_is_reported_once(block_of, plain, caplog) -> None:
    block = block_of(replace(plain, rank=60, activation="silu"), 0, torch.float32)
    made = on_device(block.block(block.values, torch.float32, torch.float32))
    x, router = (block.values[name].to(DEVICE) for name in ("x", "router"))
    triton_block._warn_slower.cache_clear()
    for top_k in (1, 3, 3):
        triton_block.fused_block(x.float(), route(x.float(), router.float(), top_k), made)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("kernel=triton is not made for 3 experts per token of rank 60 in torch.")


@pytest.mark.skipif(GPU, reason="compiled kernels take bf16")
def test_interpreter_leaves_bf16_to_the_dense_form(block_of, plain) -> None:
    block = block_of(replace(plain, activation="silu"), 0, torch.bfloat16)
    made = block.block(block.values, torch.bfloat16, torch.bfloat16)
    routing = route(block.values["x"], block.values["router"], 2)
    assert not triton_block.supports(block.values["x"].bfloat16(), routing, made)


def test_package_does_not_import_its_triton_kernels() -> None:
    """Triton is missing on many machines."""
    code = "import sys, mixlora_exp.kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mixlora_exp.kernels.mixlora.exact" in done.stdout
    assert "mixlora_exp.kernels.triton" not in done.stdout


@pytest.mark.parametrize(
    "cards",
    [
        pytest.param(["8.9"], id="the usual block, on a consumer card", marks=pytest.mark.slow),
        pytest.param(
            ["8.0", "8.9", "9.0", "all"],
            id="every table, on Ampere, a consumer card and Hopper",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_launches_compile_within_a_card(cards, tmp_path) -> None:
    """Without a GPU: Triton brings NVIDIA's assembler. The interpreter takes code that the compiler
    refuses, and knows nothing of shared memory and registers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "triton_compile.py"
    done = subprocess.run(
        [sys.executable, str(script), *cards],
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" not in done.stdout, done.stdout
    assert "fits" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_captured_in_a_cuda_graph(block_of, plain, dora) -> None:
    """Nothing is read back to the host: the graph computes for new inputs what eager mode does."""
    block = block_of(replace(plain, activation="silu", dora=dora), 0, torch.bfloat16)
    leaves = {name: v.to(DEVICE, torch.float32) for name, v in block.values.items()}
    leaves["x"] = leaves["x"].bfloat16()
    for leaf in leaves.values():
        leaf.requires_grad_()
    made = block.block(leaves, torch.bfloat16, torch.float32)
    made = on_device(made)
    upstream = block.upstream.to(DEVICE, torch.bfloat16)

    def step() -> list[Tensor]:
        routing = triton_router.route_triton(leaves["x"], leaves["router"], 2)
        y = triton_block.fused_block(routing.rows, routing, made)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
