"""The steps of `lora_linears` for eager code on a CPU: few passes over a matrix, most in place.

A low-rank product is added to a frozen one where that lies, and what dropout keeps out of it is put
back: a twentieth of the elements, where a second matrix would be zeroed and added.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.plain_linear import supports

__all__ = ["gradients_of_a", "input_gradient", "low", "missing", "scaled", "supports", "unscaled"]

HASHED = False
"""True if masks have to be made by a hash."""


def _dropped(x: Tensor, part: LowRankPart) -> Tensor:
    return x if part.mask is None else part.mask.zero(x)


def missing(part: LowRankPart) -> float:
    """Return 1: the products of `low` have the whole factor."""
    return 1.0


def low(x: Tensor, parts: Sequence[LowRankPart]) -> list[Tensor]:
    """Compute `f_g A_g drop_g(x)`, each (T, R_g). x: (T, D)."""
    return [(_dropped(x, part) @ part.a_in(x.dtype).T).mul_(part.factor) for part in parts]


def scaled(raw: Tensor, low: Tensor, part: LowRankPart) -> Tensor:
    """Compute `magnitude / norm (raw + low B^T)`, (T, F); `raw` becomes the sum."""
    return raw.addmm_(low, part.b_in(raw.dtype).T) * part.scale_in(raw.dtype)


def unscaled(
    dy: Tensor, raw: Tensor, low: Tensor, part: LowRankPart
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `scaled`: of its input before DoRA's scale (T, F), of B, of the
    magnitude. raw: the sum."""
    draw = dy * part.scale_in(dy.dtype)
    dmagnitude = (dy * raw).sum(dim=0, dtype=part.norm.dtype) / part.norm
    return draw, (draw.T @ low).to(part.b.dtype), dmagnitude.to(part.magnitude.dtype)


def gradients_of_a(x: Tensor, dlow: Sequence[Tensor], parts: Sequence[LowRankPart]) -> list[Tensor]:
    """Compute `f_g dlow_g^T drop_g(x)`, each (R_g, D). dlow: (T, R_g)."""
    return [
        (one.T @ _dropped(x, part)).to(part.a.dtype).mul_(part.factor)
        for one, part in zip(dlow, parts, strict=True)
    ]


def input_gradient(
    frozen: Sequence[Tensor], dlow: Sequence[Tensor], parts: Sequence[LowRankPart]
) -> Tensor:
    """Compute `sum_g (frozen_g + f_g drop_g(dlow_g A_g))`, in place of the first of `frozen`, each
    (T, D), which are the frozen products' gradients."""
    for own, one, part in zip(frozen, dlow, parts, strict=True):
        a, mask = part.a_in(own.dtype), part.mask
        if mask is None:
            own.addmm_(one, a, alpha=part.factor)
            continue
        if not mask.is_sparse:
            own.add_(mask.zero((one @ a).mul_(part.factor)))
            continue
        flat, elements = own.view(-1), mask.elements.long()
        before = flat.index_select(0, elements)
        own.addmm_(one, a, alpha=part.factor)
        flat.index_copy_(0, elements, before)
    for other in frozen[1:]:
        frozen[0].add_(other)
    return frozen[0]
