"""The steps of `linears` by tensor operations, written for `torch.compile`, which fuses them.

LoRA's factor goes into the cast of A, and the mask comes after the sum that the compiler makes one
product with an addend, so that neither is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixlora_exp.kernels.frozen import Frozen
from mixlora_exp.kernels.lora import LowRankPart

__all__ = ["gradients_of_a", "input_gradient", "low", "scaled", "supports", "unscaled"]

HASHED = False
"""Whether masks have to be made by a hash."""


def supports(x: Tensor, frozen: Sequence[Frozen], parts: Sequence[LowRankPart]) -> bool:
    """Whether these steps serve: the base is frozen."""
    return not any(base.requires_grad for base in frozen)


def _dropped(x: Tensor, part: LowRankPart) -> Tensor:
    return x if part.mask is None else torch.where(part.mask.kept(), x, 0.0)


def _scaled_a(part: LowRankPart, dtype: torch.dtype) -> Tensor:
    return (part.nearest(dtype).a * part.factor).to(dtype)


def low(x: Tensor, parts: Sequence[LowRankPart]) -> list[Tensor]:
    """`f_g A_g drop_g(x)`, each (T, R_g). x: (T, D)."""
    return [_dropped(x, part) @ _scaled_a(part, x.dtype).T for part in parts]


def scaled(raw: Tensor, low: Tensor, part: LowRankPart) -> Tensor:
    """`magnitude / norm (raw + low B^T)`, (T, F)."""
    return torch.addmm(raw, low, part.b_in(raw.dtype).T) * part.scale_in(raw.dtype)


def unscaled(
    dy: Tensor, raw: Tensor, low: Tensor, part: LowRankPart
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `scaled`: of what it scales (T, F), of B, of the magnitude."""
    whole = torch.addmm(raw, low, part.b_in(raw.dtype).T)
    draw = dy * part.scale_in(dy.dtype)
    dmagnitude = (dy * whole).sum(dim=0, dtype=part.norm.dtype) / part.norm
    return draw, (draw.T @ low).to(part.b.dtype), dmagnitude.to(part.magnitude.dtype)


def gradients_of_a(x: Tensor, dlow: Sequence[Tensor], parts: Sequence[LowRankPart]) -> list[Tensor]:
    """`f_g dlow_g^T drop_g(x)`, each (R_g, D). dlow: (T, R_g)."""
    return [
        (one.T @ _dropped(x, part)).to(part.a.dtype) * part.factor
        for one, part in zip(dlow, parts, strict=True)
    ]


def input_gradient(
    frozen: Sequence[Tensor], dlow: Sequence[Tensor], parts: Sequence[LowRankPart]
) -> Tensor:
    """`sum_g (frozen_g + f_g drop_g(dlow_g A_g))`. frozen: (T, D), of the frozen products."""
    found = []
    for own, one, part in zip(frozen, dlow, parts, strict=True):
        both = torch.addmm(own, one, _scaled_a(part, own.dtype))
        found.append(both if part.mask is None else torch.where(part.mask.kept(), both, own))
    return sum(found[1:], start=found[0])
