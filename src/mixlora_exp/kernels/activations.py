"""The gate's activation and its derivative, for kernels with a backward pass of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Activation", "activate", "activation_gradient", "known_activation"]

Activation = str | Callable[[Tensor], Tensor]
"""`silu`, `gelu`, `gelu_tanh`, or any differentiable function of one tensor."""

NAMES = ("silu", "gelu", "gelu_tanh")


def known_activation(activation: Callable[[Tensor], Tensor]) -> Activation:
    """Return the name of `activation` if it is one of `NAMES` by its values, else itself.

    By value, because transformers, torch and users each have classes of their own for them.
    """
    probe = torch.linspace(-6, 6, 49)
    with torch.no_grad():
        made = activation(probe)
        for name in NAMES:
            if torch.allclose(made, activate(probe, name), rtol=0, atol=1e-6):
                return name
    return activation


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return the activation, a new tensor."""
    if callable(activation):
        return activation(x)
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate=_approximation(activation))


def activation_gradient(
    grad: Tensor, x: Tensor, activation: Activation, out: Tensor | None = None
) -> Tensor:
    """Compute `grad * activation'(x)`, in `out` where it is given."""
    if callable(activation):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            made = torch.autograd.grad(activation(leaf), leaf, grad)[0]
        return made if out is None else out.copy_(made)
    given = {} if out is None else {"grad_input": out}
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x, **given)
    return torch.ops.aten.gelu_backward(grad, x, approximate=_approximation(activation), **given)


def _approximation(name: str) -> str:
    return "tanh" if name == "gelu_tanh" else "none"
