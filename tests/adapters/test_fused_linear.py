"""One fused layer against PEFT's: numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import layer as stock
from torch import Tensor, nn

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.linear import FusedLinear, ReferenceLinear

IN, OUT = 12, 20


def make_layer(
    dora: bool = False,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    kernel: str = "exact",
    **changes: Any,
) -> stock.Linear:
    """A layer with random A, B and magnitude, the same whatever the kernel."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).to(dtype)
    model = nn.ModuleDict({"proj": base})
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["proj"], "use_dora": dora, **changes}
    inject_adapter_in_model(LoraConfig(**options), model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    set_kernel(model, kernel)
    return model["proj"].train()


def run(layer: nn.Module, x: Tensor, seed: int = 4) -> dict[str, Tensor]:
    """Output and gradients, dropout drawn from the seed."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad
    layer.zero_grad()
    return found


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        size = expected[name].abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance * size, msg=name
        )


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def dora(request: pytest.FixtureRequest) -> bool:
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-12, id="float64"),
        pytest.param(torch.float32, 1e-5, id="float32"),
        pytest.param(torch.bfloat16, 0.03, id="bf16"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias in the base layer"])
def test_equals_peft_without_dropout(dora, dtype, tolerance, bias) -> None:
    """Output, and gradients of x, A, B and magnitude."""
    x = draw(2, 5, IN, dtype=dtype)
    fused, peft = (make_layer(dora, dtype, bias, kernel) for kernel in ("exact", "peft"))
    assert type(fused) is FusedLinear
    assert type(peft) is stock.Linear
    expected = run(peft, x)
    assert len(expected) == (5 if dora else 4)
    check(run(fused, x), expected, tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"use_rslora": True}, id="scaling alpha / sqrt(r)"),
        pytest.param({"lora_alpha": 0.5}, id="scaling below 1"),
        pytest.param({"r": 32}, id="rank above both sizes"),
        pytest.param({"r": 1}, id="rank 1"),
    ],
)
def test_options_of_peft(dora, changes) -> None:
    x = draw(7, IN)
    fused, peft = (make_layer(dora, kernel=kernel, **changes) for kernel in ("exact", "peft"))
    check(run(fused, x), run(peft, x), 1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, IN), id="rows"),
        pytest.param((2, 3, IN), id="batch"),
        pytest.param((2, 3, 4, IN), id="batch of batches"),
        pytest.param((1, 1, IN), id="one token"),
        pytest.param((IN,), id="one vector"),
        pytest.param((0, IN), id="no rows"),
        pytest.param((2, 0, IN), id="no tokens"),
    ],
)
def test_shapes(dora, shape) -> None:
    x = draw(*shape)
    fused, peft = (make_layer(dora, kernel=kernel)(x) for kernel in ("exact", "peft"))
    assert fused.shape == (*shape[:-1], OUT)
    # PEFT's DoRA makes a row of a vector.
    torch.testing.assert_close(fused, peft.view(fused.shape))


def test_strided_input(dora) -> None:
    """As a transposed head dimension leaves it."""
    x = draw(3, 2, IN).transpose(0, 1)
    assert not x.is_contiguous()
    check(run(make_layer(dora), x), run(make_layer(dora, kernel="peft"), x), 1e-12)


@pytest.mark.parametrize("p", [0.3, 0.7], ids=["sparse mask", "bool mask"])
def test_fused_equals_plain_operations_under_dropout(dora, p) -> None:
    """Both draw the same mask from a seed."""
    x = draw(2, 9, IN)
    fused, plain = (
        make_layer(dora, kernel=kernel, lora_dropout=p, bias=True)
        for kernel in ("exact", "reference")
    )
    assert type(plain) is ReferenceLinear
    found = run(fused, x)
    check(found, run(plain, x), 1e-12)
    assert not torch.allclose(found["y"], run(fused, x, seed=5)["y"])
    assert not torch.allclose(found["y"], fused.eval()(x))


def test_dropout_of_lora_is_distributed_as_in_peft() -> None:
    """The mean of many passes is the pass without dropout, and their spread is that of PEFT."""
    x = draw(3, IN)
    spreads = []
    for kernel in ("exact", "peft"):
        layer = make_layer(kernel=kernel, lora_dropout=0.3)
        with torch.no_grad():
            passes = torch.stack([layer(x) for _ in range(1500)])
            error = (passes.mean(dim=0) - layer.eval()(x)).abs()
        assert (error <= 6 * passes.std(dim=0) / 1500**0.5).all()
        spreads.append(passes.std(dim=0))
    # The standard deviation of 1500 draws is known to about 2 %.
    torch.testing.assert_close(*spreads, rtol=0.2, atol=0)


def test_dropout_acts_on_the_low_rank_branch_only(dora) -> None:
    """With B = 0 the output is that of the frozen weight, times m / ||W|| for DoRA."""
    layer = make_layer(dora, lora_dropout=0.5)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    x = draw(6, IN)
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.eval()(x))
    expected = x @ layer.base_layer.weight.T
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        expected = expected * magnitude / layer.base_layer.weight.norm(dim=-1)
    torch.testing.assert_close(layer(x), expected)


def test_evaluation_does_not_drop(dora) -> None:
    x = draw(6, IN)
    layer = make_layer(dora, lora_dropout=0.5).eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(layer(x), make_layer(dora)(x))
    torch.set_rng_state(state)
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast(dora) -> None:
    """bf16 products on float32 weights: PEFT's dtypes, and its numbers to bf16."""
    x = draw(2, 9, IN, dtype=torch.float32)
    found = []
    for kernel in ("exact", "peft"):
        layer = make_layer(dora, torch.float32, bias=True, kernel=kernel)
        with torch.autocast("cpu", torch.bfloat16):
            results = run(layer, x)
        assert results["y"].dtype == torch.bfloat16
        found.append(results)
    truth = run(make_layer(dora, torch.float32, bias=True), x)
    for name, expected in truth.items():
        errors = [(results[name] - expected).norm() / expected.norm() for results in found]
        assert errors[0] <= 2 * errors[1] + 0.004, (name, errors)


def test_bf16_base_with_float32_adapters(dora) -> None:
    """As `get_peft_model` makes them: the output is bf16, the adapters' gradients float32."""
    x = draw(40, IN, dtype=torch.bfloat16)
    found = []
    for kernel in ("exact", "peft"):
        layer = make_layer(dora, torch.bfloat16, kernel=kernel)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        found.append(run(layer, x))
    check(*found, 0.03)


def test_bias_that_is_trained(dora) -> None:
    """`bias="lora_only"` trains the biases of the layers that have LoRA."""
    x = draw(7, IN)
    layers = [make_layer(dora, bias=True, kernel=kernel) for kernel in ("exact", "peft")]
    for layer in layers:
        layer.base_layer.bias.requires_grad_()
    found, expected = (run(layer, x) for layer in layers)
    assert "base_layer.bias" in found
    check(found, expected, 1e-12)


def test_base_layer_with_a_forward_pass_of_its_own_keeps_it(dora) -> None:
    """A subclass of nn.Linear may do more than its weight says: PEFT's pass calls it."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = make_layer(dora)
    layer.base_layer.__class__ = Doubled
    x = draw(7, IN)
    found = layer(x)
    layer.__class__ = stock.Linear
    assert torch.equal(found, layer(x))
    layer.base_layer.__class__ = nn.Linear
    assert not torch.allclose(found, layer(x))
