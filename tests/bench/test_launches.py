"""What counts as a launch: operations and Triton kernels, but no views."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixlora_exp.bench.launches import LaunchCounter


@torch.library.custom_op("mixlora::test_ten_additions", mutates_args=())
def ten_additions(x: Tensor) -> Tensor:
    y = torch.empty_like(x).zero_()
    for _ in range(10):
        y = y + x
    return y.view(-1).view(x.shape)


@ten_additions.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


ten_additions.register_autograd(lambda context, dy: 10 * dy)


@pytest.fixture
def x() -> Tensor:
    return torch.ones(2, 4)


def test_an_operator_of_this_project_counts_as_what_it_launches(x: Tensor) -> None:
    with LaunchCounter() as counter:
        y = torch.ops.mixlora.test_ten_additions(x)
    assert torch.equal(y, 10 * x)
    assert counter.launches == {"zero_": 1, "add": 10}
    leaf = x.clone().requires_grad_()
    with LaunchCounter() as counter:
        torch.ops.mixlora.test_ten_additions(leaf).sum().backward()
    assert torch.equal(leaf.grad, 10 * torch.ones_like(x))
    # The gradient is stored, not copied.
    assert counter.launches == {"zero_": 1, "add": 10, "sum": 1, "ones_like": 1, "mul": 1}


def test_views_and_allocations_launch_nothing(x: Tensor) -> None:
    with LaunchCounter() as counter:
        y = x.view(8)[2:].unsqueeze(0).expand(3, 6).transpose(0, 1).detach()
        torch.empty(3), torch.empty_like(y), x.new_empty(2), y.T.split(2), x.unbind(0)
        torch.empty_strided((2, 2), (2, 1)), x.reshape(4, 2), x.to(torch.float32)
    assert counter.total == 0


def test_what_writes_copies_or_is_read_by_the_host_is_launched(x: Tensor) -> None:
    with LaunchCounter() as counter:
        x.add_(1)
        x.t().contiguous()
        x.bfloat16()
        float(x.sum())
        torch._foreach_mul_([x, x], 2.0)
        torch.zeros(3)
    expected = ("add_", "clone", "_to_copy", "sum", "_local_scalar_dense", "_foreach_mul_", "zeros")
    assert counter.launches == dict.fromkeys(expected, 1)


def test_the_backward_pass_counts_and_sums_of_gradients_too() -> None:
    linear = nn.Linear(4, 3)
    batch = torch.ones(2, 4)
    with LaunchCounter() as counter:
        loss = linear(batch).sum()
    assert counter.launches == {"addmm": 1, "sum": 1}
    counts = []
    for _ in range(2):
        with LaunchCounter() as counter:
            linear(batch).sum().backward()
        counts.append(counter.total)
    # Of weight and bias.
    assert counts[1] == counts[0] + 2
    assert loss is not None


def test_fake_tensors_count_the_same_without_computing(x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), LaunchCounter() as counter:
        made = torch.ops.mixlora.test_ten_additions(torch.empty(1 << 20, 1 << 20, device="cuda"))
    assert made.device.type == "cuda"
    assert counter.launches == {"zero_": 1, "add": 10}


def test_nothing_is_counted_outside(x: Tensor) -> None:
    counter = LaunchCounter()
    with pytest.raises(ZeroDivisionError), counter:
        torch.ops.mixlora.test_ten_additions(x) / (1 // 0)
    x + 1
    assert counter.total == 11
    with counter:
        x + 1
    assert counter.total == 12


KERNEL = """
import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton


@triton.jit
def double_kernel(x, y, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(y + at, 2 * tl.load(x + at))


@triton_op("mixlora_interpreted::test_double", mutates_args={})
def double(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    wrap_triton(double_kernel)[(1,)](x, y, WIDTH=8)
    return y + 1
"""


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An operator with a Triton kernel, which the interpreter runs on a CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path_factory.mktemp("kernel") / "double_case.py"
    path.write_text(KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("double_case", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.double


def test_a_triton_kernel_is_one_launch(double: Any) -> None:
    x = torch.ones(8, device="cuda" if torch.cuda.is_available() else "cpu")
    with LaunchCounter() as counter:
        y = double(x)
    assert y.tolist() == [3.0] * 8
    assert counter.launches == {"triton:double_kernel": 1, "add": 1}


def test_a_triton_kernel_may_be_replaced_or_only_counted(double: Any) -> None:
    x, seen = torch.ones(8), []

    def replace(name: str, arguments: dict[str, Any]) -> None:
        arguments["y"].fill_(5.0)
        seen.append((name, sorted(arguments)))

    with LaunchCounter(replace) as counter:
        assert double(x).tolist() == [6.0] * 8
    assert seen == [("double_kernel", ["WIDTH", "x", "y"])]
    assert counter.launches == {"triton:double_kernel": 1, "add": 1}
    with FakeTensorMode(), LaunchCounter() as counter:
        double(torch.empty(8))
    assert counter.launches == {"triton:double_kernel": 1, "add": 1}
