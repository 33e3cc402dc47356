"""Triton launches as operators of torch, which `torch.compile` takes into its graph as they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["on_device_of", "operator", "start"]


def _is_watched() -> bool:
    """Return whether a compiler or a dispatch mode such as a counter sees the operators."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def operator(name: str, changes: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Register the decorated function as `mixlora::name`: its results are fresh tensors, and all
    that it launches goes through `start`. changes: its arguments that a kernel writes to.

    It is closed to compilers, which would otherwise pass a kernel's numbers in other types than its
    launcher does, and guess which tensors it writes to. Where nobody watches, the function runs
    without torch's dispatcher, which takes as long as a launch.
    """

    def register(function: Callable) -> Callable:
        # Both are there in a process that also runs the kernels interpreted.
        space = "mixlora_interpreted" if INTERPRETED else "mixlora"
        made = torch.library.custom_op(f"{space}::{name}", function, mutates_args=changes)
        made.register_fake(function)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return made(*arguments) if _is_watched() else function(*arguments)

        return call

    return register


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launch a kernel over a grid. Tensors without data are left as they are."""
    if not any(isinstance(a, Tensor) and is_fake(a) for a in (*arguments, *named.values())):
        kernel[grid](*arguments, **named)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which launches go to the tensor's GPU, if there is one."""
    if tensor.is_cuda and torch.cuda.is_available():
        return torch.cuda.device_of(tensor)
    return contextlib.nullcontext()
