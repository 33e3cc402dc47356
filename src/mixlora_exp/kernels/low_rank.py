"""One adapter of a linear layer as the functions of `lora` and `lora_many` take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora_exp.kernels.dropout import DropMask
from mixlora_exp.kernels.shapes import Low

__all__ = ["LowRankPart"]


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """One adapter of a layer: a (R, in), b (out, R), the LoRA scaling s; DoRA's magnitude and norm
    (out,), both or none; the dropout mask of its rows, if any; and copies of a, b and scale in
    the dtype of the products, where they are cached."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    mask: DropMask | None = None
    low: Low | None = None

    @property
    def factor(self) -> float:
        """LoRA's scaling times the factor by which dropout multiplies kept elements."""
        return self.scaling * (1.0 if self.mask is None else self.mask.scale)

    def nearest(self, dtype: torch.dtype) -> Low:
        """Return a, b and scale in a dtype where they are cached, else the parameters as they
        are."""
        if self.low is not None and self.low.a.dtype == dtype:
            return self.low
        return Low(self.a, self.b)

    def a_in(self, dtype: torch.dtype) -> Tensor:
        """Return A (R, in) in a dtype, cached or cast."""
        return self.nearest(dtype).a.to(dtype)

    def b_in(self, dtype: torch.dtype) -> Tensor:
        """Return B (out, R) in a dtype, cached or cast."""
        return self.nearest(dtype).b.to(dtype)

    def scale_in(self, dtype: torch.dtype) -> Tensor:
        """Return DoRA's `m / ||W + s B A||` (out,) in a dtype."""
        scale = self.nearest(dtype).scale
        return (self.magnitude / self.norm).to(dtype) if scale is None else scale


PER_PART = 5


def flat(parts: Sequence[LowRankPart]) -> list[Tensor | None]:
    """Return the tensors of the parts in the order in which autograd saves them: `PER_PART` each,
    first those with a gradient: a, b and magnitude."""
    tensors: list[Tensor | None] = []
    for p in parts:
        tensors += [p.a, p.b, p.magnitude, p.norm, None if p.mask is None else p.mask.elements]
    return tensors


def described(parts: Sequence[LowRankPart]) -> tuple[tuple, ...]:
    """Return what `flat` leaves out of each part: its scaling, the description of its mask, and the
    cached copies, which last as long as the adapter."""
    return tuple((p.scaling, None if p.mask is None else p.mask.described, p.low) for p in parts)


def rebuilt(spec: Sequence[tuple], tensors: Sequence[Tensor | None]) -> list[LowRankPart]:
    """Rebuild the parts from `described` and `flat`."""
    found = []
    for i, (scaling, mask, low) in enumerate(spec):
        a, b, magnitude, norm, elements = tensors[i * PER_PART : (i + 1) * PER_PART]
        held = None if mask is None else DropMask.rebuilt(elements, mask)
        found.append(LowRankPart(a, b, scaling, magnitude, norm, held, low))
    return found
