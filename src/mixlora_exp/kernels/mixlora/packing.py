"""A block as a flat list of tensors and back, as an autograd function must take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mixlora_exp.kernels.activations import Activation
from mixlora_exp.kernels.dropout import DropMask
from mixlora_exp.kernels.frozen import Frozen
from mixlora_exp.kernels.shapes import ROLES, Experts, FeedForward, Low, Projection

__all__ = ["Spec", "pack", "unpack"]

PER_PROJECTION = 5


class _WithBias(Frozen):
    """A frozen projection with its bias as autograd hands it on."""

    def __init__(self, frozen: Frozen, bias: Tensor | None) -> None:
        self.frozen, self.bias = frozen, bias

    def weight(self) -> Tensor:
        return self.frozen.weight()

    def linear(self, x: Tensor) -> Tensor:
        return self.frozen.linear(x)

    def input_gradient(self, dy: Tensor) -> Tensor:
        return self.frozen.input_gradient(dy)


@dataclass(frozen=True, slots=True)
class Spec:
    """The parts of a block that autograd need not see: by role the LoRA scaling and weights in the
    products' dtype (None without experts), the frozen projections, the activation, and the
    description of the masks."""

    scalings: tuple[float | None, ...]
    lows: tuple[Low | None, ...]
    frozen: tuple[Frozen, ...]
    activation: Activation
    masks: tuple[tuple | None, ...]


def pack(block: FeedForward) -> tuple[Spec, list[Tensor | None]]:
    """Return (spec, tensors): a, b, magnitude, norm, bias of gate, up and down, then the masks."""
    scalings, lows, tensors = [], [], []
    for projection in block.projections.values():
        e = projection.experts
        scalings.append(None if e is None else e.scaling)
        lows.append(None if e is None else e.low)
        parts = (None,) * 4 if e is None else (e.a, e.b, e.magnitude, e.norm)
        tensors += [*parts, projection.bias]
    masks = (block.x_mask, block.hidden_mask)
    tensors += [None if mask is None else mask.elements for mask in masks]
    described = tuple(None if mask is None else mask.described for mask in masks)
    frozen = tuple(projection.frozen for projection in block.projections.values())
    return Spec(tuple(scalings), tuple(lows), frozen, block.activation, described), tensors


def unpack(spec: Spec, tensors: Sequence[Tensor | None]) -> FeedForward:
    """Rebuild the block of which `pack` made these."""
    projections = []
    described = zip(spec.scalings, spec.lows, spec.frozen, strict=True)
    for i, (scaling, low, frozen) in enumerate(described):
        first = i * PER_PROJECTION
        a, b, magnitude, norm, bias = tensors[first : first + PER_PROJECTION]
        experts = None if scaling is None else Experts(a, b, scaling, magnitude, norm, low)
        projections.append(Projection(_WithBias(frozen, bias), experts))
    masks = [
        None if described is None else DropMask.rebuilt(elements, described)
        for elements, described in zip(
            tensors[len(ROLES) * PER_PROJECTION :], spec.masks, strict=True
        )
    ]
    return FeedForward(*projections, spec.activation, 0.0, *masks)
