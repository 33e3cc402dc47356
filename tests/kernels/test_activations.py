"""The gate's activation by name or as a function, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from mixlora_exp.kernels import known_activation
from mixlora_exp.kernels.activations import activate, activation_gradient

FUNCTIONS: dict[str, Callable] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        pytest.param(functional.silu, "silu", id="torch's silu"),
        pytest.param(nn.SiLU(), "silu", id="torch's module"),
        pytest.param(ACT2FN["silu"], "silu", id="transformers' class, as in Llama"),
        pytest.param(ACT2FN["swish"], "silu", id="another name of it"),
        pytest.param(functional.gelu, "gelu", id="torch's gelu"),
        pytest.param(ACT2FN["gelu"], "gelu", id="transformers' gelu"),
        pytest.param(ACT2FN["gelu_pytorch_tanh"], "gelu_tanh", id="as in Gemma"),
        pytest.param(ACT2FN["gelu_new"], "gelu_tanh", id="the same by hand"),
    ],
)
def test_known_by_its_values(activation, name) -> None:
    assert known_activation(activation) == name


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(functional.relu, id="ReLU"),
        pytest.param(ACT2FN["quick_gelu"], id="sigmoid(1.702 x) x, near gelu"),
        pytest.param(functional.mish, id="mish, near silu"),
        pytest.param(torch.nn.PReLU(), id="one with a parameter"),
    ],
)
def test_another_stays_a_function(activation) -> None:
    assert known_activation(activation) is activation


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_name_is_the_function(name, dtype) -> None:
    x = (torch.randn(50, dtype=torch.float64) * 3).to(dtype)
    grad = torch.randn(50).to(dtype)
    assert torch.equal(activate(x, name), FUNCTIONS[name](x))
    leaf = x.clone().requires_grad_()
    FUNCTIONS[name](leaf).backward(grad)
    found = activation_gradient(grad, x, name)
    assert found.dtype == dtype
    torch.testing.assert_close(found, leaf.grad)
    torch.testing.assert_close(activation_gradient(grad, x, FUNCTIONS[name]), leaf.grad)
    assert not x.requires_grad


def test_gradient_of_an_unnamed_one_under_no_grad() -> None:
    """As in a backward pass."""
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)
    with torch.no_grad():
        found = activation_gradient(torch.ones_like(x), x, torch.tanh)
    torch.testing.assert_close(found, 1 - x.tanh() ** 2)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernel_with_a_name_equals_the_function(
    block_of, plain, form, fresh_seed, same, name, dora
) -> None:
    block = block_of(replace(plain, dora=dora, activation=name), fresh_seed)
    function = replace(block, case=replace(block.case, activation=FUNCTIONS[name]))
    same(block.run(form, torch.float64), function.run("reference", torch.float64))


def test_kernel_with_an_activation_that_has_no_name(
    block_of, plain, form, fresh_seed, same
) -> None:
    block = block_of(replace(plain, activation=functional.mish), fresh_seed)
    truth = block.run("reference", torch.float64)
    same(block.run(form, torch.float64), truth)
    silu = replace(block, case=replace(block.case, activation="silu"))
    assert not torch.allclose(silu.run(form, torch.float64)["y"], truth["y"])
