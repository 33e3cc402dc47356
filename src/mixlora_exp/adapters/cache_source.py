"""The weights that others are made from, and how a change of them is noticed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mixlora_exp.kernels import is_quantized, matrix_of, stored

__all__ = ["STEPS", "Source", "adapters_changed", "source_on"]


class _Steps:
    """Counts the steps of all optimizers in this process.

    Tensor versions alone do not tell of every change: fused AdamW writes past them.
    """

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer, args, kwargs) -> None:
        self.count += 1


STEPS = _Steps()


def adapters_changed() -> None:
    """Tell that adapter weights were written in a way that leaves no trace, through `weight.data`:
    what is made from them is made anew before its next use, as after an optimizer step."""
    STEPS.count += 1


class Source(NamedTuple):
    """An adapter of one projection: the frozen weight (out, in); a (R, in), b (out, R), with DoRA
    the magnitude (out,); of E experts a (E, R, in), b (E, out, R) and (E, out).

    dequantized: of a quantised weight, whose tensor is then the one that it is stored in, makes the
    matrix (out, in)."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    dequantized: Callable[[], Tensor] | None = None

    def matrix(self) -> Tensor:
        """Return the frozen weight (out, in), a quantised one made anew."""
        return self.weight if self.dequantized is None else self.dequantized()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the copies depend on; with DoRA also the frozen weight, for its norm."""
        if self.magnitude is None:
            return self.a, self.b
        return self.weight, self.a, self.b, self.magnitude

    def state(self, changes: int) -> tuple:
        """Return a key that changes if a tensor was written to or moved, an optimizer stepped, or
        `changes` grew."""
        seen = tuple((t.data_ptr(), t._version, t.dtype) for t in self.tensors)
        return STEPS.count, changes, self.scaling, seen


def source_on(
    base: nn.Linear, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None
) -> Source:
    """Return the source of an adapter of a projection of the base model."""
    if is_quantized(base):
        return Source(stored(base.weight), a, b, scaling, magnitude, partial(matrix_of, base))
    return Source(base.weight, a, b, scaling, magnitude)
