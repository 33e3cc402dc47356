"""The steps of `lora_linears` by tensor operations, which `torch.compile` fuses.

LoRA's factor goes into products with an addend, and the mask comes after their sum, so that neither
is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixlora_exp.kernels.low_rank import LowRankPart

__all__ = ["gradients_of_a", "input_gradient", "low", "missing", "scaled", "supports", "unscaled"]

HASHED = False
"""True if masks have to be made by a hash."""


def supports(x: Tensor, parts: Sequence[LowRankPart]) -> bool:
    """Return True: these steps run anywhere."""
    return True


def _dropped(x: Tensor, part: LowRankPart) -> Tensor:
    return x if part.mask is None else torch.where(part.mask.kept(), x, 0.0)


def missing(part: LowRankPart) -> float:
    """Return the factor that the products of `low` lack: all of it, `part.factor`."""
    return part.factor


def low(x: Tensor, parts: Sequence[LowRankPart]) -> list[Tensor]:
    """Compute `A_g drop_g(x)`, each (T, R_g). x: (T, D)."""
    return [_dropped(x, part) @ part.a_in(x.dtype).T for part in parts]


def scaled(raw: Tensor, low: Tensor, part: LowRankPart) -> Tensor:
    """Compute `magnitude / norm (raw + f low B^T)`, (T, F)."""
    return _whole(raw, low, part) * part.scale_in(raw.dtype)


def _whole(raw: Tensor, low: Tensor, part: LowRankPart) -> Tensor:
    return torch.addmm(raw, low, part.b_in(raw.dtype).T, alpha=part.factor)


def unscaled(
    dy: Tensor, raw: Tensor, low: Tensor, part: LowRankPart
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `scaled`: of its input before DoRA's scale (T, F), of B, of the
    magnitude."""
    whole = _whole(raw, low, part)
    draw = dy * part.scale_in(dy.dtype)
    dmagnitude = (dy * whole).sum(dim=0, dtype=part.norm.dtype) / part.norm
    return draw, (draw.T @ low).to(part.b.dtype) * part.factor, dmagnitude.to(part.magnitude.dtype)


def gradients_of_a(x: Tensor, dlow: Sequence[Tensor], parts: Sequence[LowRankPart]) -> list[Tensor]:
    """Compute `f_g dlow_g^T drop_g(x)`, each (R_g, D). dlow: (T, R_g)."""
    return [
        (one.T @ _dropped(x, part)).to(part.a.dtype) * part.factor
        for one, part in zip(dlow, parts, strict=True)
    ]


def input_gradient(
    frozen: Sequence[Tensor], dlow: Sequence[Tensor], parts: Sequence[LowRankPart]
) -> Tensor:
    """Compute `sum_g (frozen_g + f_g drop_g(dlow_g A_g))`, (T, D). frozen: (T, D), the gradients of
    the frozen products."""
    found = []
    for own, one, part in zip(frozen, dlow, parts, strict=True):
        both = torch.addmm(own, one, part.a_in(own.dtype), alpha=part.factor)
        found.append(both if part.mask is None else torch.where(part.mask.kept(), both, own))
    return sum(found[1:], start=found[0])
