"""A frozen projection as the kernels use it: its product, and the gradient of its input."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["Frozen", "FrozenLinear"]


class Frozen(ABC):
    """A frozen weight W (out, in), however it is stored, and its bias (out,) or None.

    A subclass gives `weight`; one that has a faster way to multiply gives `linear` and
    `input_gradient` too. Kernels add the bias by themselves.
    """

    bias: Tensor | None = None

    @abstractmethod
    def weight(self) -> Tensor:
        """W (out, in), in the dtype of the products; it may be made anew at each call."""

    @property
    def requires_grad(self) -> bool:
        """True if weight or bias is trained after all."""
        return self.bias is not None and self.bias.requires_grad

    def linear(self, x: Tensor) -> Tensor:
        """Compute `x W^T`, without the bias, differentiable in x. x: (..., in); returns (...,
        out)."""
        return _Product.apply(x, self)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """Compute `dy W`: the gradient of `linear`'s input. dy: (..., out); returns (..., in)."""
        return dy @ self.weight()


class _Product(torch.autograd.Function):
    """Saves no tensor for the backward pass: W stays in memory anyway."""

    @staticmethod
    def forward(ctx, x, frozen):
        ctx.frozen = frozen
        return functional.linear(x, frozen.weight())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return ctx.frozen.input_gradient(dy), None


class FrozenLinear(Frozen):
    """The weight and bias of an `nn.Linear`, a matrix in the dtype of the products.

    weight: (out, in); bias: (out,) or None. Where they ask for a gradient after all, autograd
    follows them through `linear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self.bias = weight, bias

    def weight(self) -> Tensor:
        """Return the weight as it is held."""
        return self._weight

    @property
    def requires_grad(self) -> bool:
        """True if weight or bias asks for a gradient."""
        # Not `super()`, which `torch.compile` cannot follow to a property.
        return self._weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def linear(self, x: Tensor) -> Tensor:
        """Compute `x W^T` as autograd does, so that W gets a gradient if it asks for one."""
        return functional.linear(x, self._weight)
