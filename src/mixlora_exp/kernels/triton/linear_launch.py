"""The steps of `kernels.lora` by Triton kernels, and their launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.kernels.dropout import HashMask
from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.triton.linear import low_kernel, scaled_kernel
from mixlora_exp.kernels.triton.linear_backward import (
    a_kernel,
    input_kernel,
    scaled_backward_kernel,
)
from mixlora_exp.kernels.triton.operators import on_device_of, operator, start
from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["gradients_of_a", "input_gradient", "low", "missing", "scaled", "supports", "unscaled"]

HASHED = True
"""True if masks have to be made by a hash."""
MAX_GROUP = 3
"""Projections that a launch takes."""

# Tokens, columns, warps and stages by kernel and padded rank: of half precision, and of float32,
# whose products run outside the tensor cores and hold whole rows in registers. A program's sums
# take at most 64 registers of a thread. Compiled for compute capabilities 8.0, 8.9 and 9.0 none
# spills more than 8 registers, and shared memory stays below the 99 KB of a consumer card.
HALF_TILES = {
    "low": {64: (32, 64, 4, 3), 128: (32, 64, 4, 3), 256: (32, 32, 4, 2)},
    "a": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 2)},
    "input": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
    "scaled": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
    "unscaled": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 2)},
}
FULL_TILES = {
    "low": (16, 16, 8, 1),
    "a": (16, 16, 4, 1),
    "input": (16, 16, 4, 1),
    "scaled": (16, 32, 4, 1),
    "unscaled": (16, 16, 4, 1),
}
SMALL_TILES = (16, 16, 4, 1)
"""The interpreter's, so that small tests have several."""


def missing(part: LowRankPart) -> float:
    """Return the factor that `low` does not have yet: none."""
    return 1.0


def _max_rank(dtype: torch.dtype) -> int:
    """Return the largest rank that the kernels take."""
    return 128 if dtype == torch.float32 else max(HALF_TILES["low"])


def tiles(kernel: str, rank: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Return the tile sizes of a kernel, its warps and stages, for a padded rank."""
    if INTERPRETED:
        return SMALL_TILES
    if dtype == torch.float32:
        return FULL_TILES[kernel]
    return HALF_TILES[kernel][max(64, rank)]


def _count(size: int, tile: int) -> int:
    """Return tiles that hold `size`; Triton's own function takes as long as a launch."""
    return -(-size // tile)


def _options(kernel: str, ranks: list[int], dtype: torch.dtype, width: str) -> dict[str, int]:
    """Return a kernel's constants: PADDED, the block sizes BT and `width`, warps and stages."""
    rank = max(16, 1 << (max(ranks) - 1).bit_length())
    tokens, columns, warps, stages = tiles(kernel, rank, dtype)
    return {"PADDED": rank, "BT": tokens, width: columns, "num_warps": warps, "num_stages": stages}


def _numbered(values: list[Any], name: str, absent: Any = None) -> dict[str, Any]:
    """Return arguments `name0` to `name2`."""
    values = [*values, *[absent] * (MAX_GROUP - len(values))]
    return {f"{name}{i}": value for i, value in enumerate(values)}


def _masks(
    keys: list[Tensor | None], places: list[int], thresholds: list[int], factors: list[float]
) -> dict[str, Any]:
    return {
        **_numbered(keys, "keys"),
        **_numbered(places, "place", 0),
        **_numbered(thresholds, "threshold", 0),
        **_numbered(factors, "factor", 0.0),
        **_numbered([key is not None for key in keys], "MASKED", False),
        "G": len(keys),
    }


@operator("lora_low")
def _low(
    x: Tensor,
    a: list[Tensor],
    keys: list[Tensor | None],
    places: list[int],
    thresholds: list[int],
    factors: list[float],
) -> list[Tensor]:
    """Compute `f_g A_g drop_g(x)`, each (T, R_g) in the dtype of x. x: (T, D); a: (R_g, D); keys:
    (T,), or None without dropout."""
    ranks = [one.shape[0] for one in a]
    made = [x.new_empty(x.shape[0], rank) for rank in ranks]
    options = _options("low", ranks, x.dtype, "BD")
    grid = (_count(x.shape[0], options["BT"]), len(a))
    with on_device_of(x):
        start(
            low_kernel,
            grid,
            x=x,
            **_numbered([one.contiguous() for one in a], "a"),
            **_numbered(made, "low"),
            **_masks(keys, places, thresholds, factors),
            T=x.shape[0],
            D=x.shape[1],
            **_numbered(ranks, "R", 0),
            **options,
        )
    return made


@operator("dora_scaled")
def _scaled(frozen: Tensor, low: Tensor, b: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """Compute `magnitude / norm (frozen + low B^T)`, (T, F)."""
    tokens, width = frozen.shape
    y = torch.empty_like(frozen)
    options = _options("scaled", [low.shape[1]], low.dtype, "BF")
    grid = _count(tokens, options["BT"]), _count(width, options["BF"])
    with on_device_of(frozen):
        start(
            scaled_kernel,
            grid,
            frozen=frozen,
            low=low,
            b=b.contiguous(),
            magnitude=magnitude,
            norm=norm,
            y=y,
            T=tokens,
            F=width,
            R=low.shape[1],
            **options,
        )
    return y


@operator("dora_unscaled")
def _unscaled(
    dy: Tensor,
    frozen: Tensor,
    low: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    b_dtype: torch.dtype,
) -> list[Tensor]:
    """Return the gradients of `_scaled`: of what it scales (T, F), of B in a dtype, of the
    magnitude."""
    tokens, width = dy.shape
    rank = low.shape[1]
    draw = torch.empty_like(frozen)
    db = torch.empty((width, rank), dtype=b_dtype, device=dy.device)
    dmagnitude = torch.empty_like(magnitude)
    options = _options("unscaled", [rank], low.dtype, "BF")
    grid = (_count(width, options["BF"]),)
    with on_device_of(dy):
        start(
            scaled_backward_kernel,
            grid,
            dy=dy,
            frozen=frozen,
            low=low,
            b=b.contiguous(),
            magnitude=magnitude,
            norm=norm,
            draw=draw,
            db=db,
            dmagnitude=dmagnitude,
            T=tokens,
            F=width,
            R=rank,
            **options,
        )
    return [draw, db, dmagnitude]


@operator("lora_a_gradients")
def _gradients_of_a(
    x: Tensor,
    dlow: list[Tensor],
    a: list[Tensor],
    keys: list[Tensor | None],
    places: list[int],
    thresholds: list[int],
    factors: list[float],
) -> list[Tensor]:
    """Compute `f_g dlow_g^T drop_g(x)`, each as the parameter a, (R_g, D). dlow: (T, R_g)."""
    tokens, width = x.shape
    ranks = [one.shape[0] for one in a]
    made = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in a]
    options = _options("a", ranks, x.dtype, "BD")
    grid = (_count(width, options["BD"]), len(dlow))
    with on_device_of(x):
        start(
            a_kernel,
            grid,
            x=x,
            **_numbered(dlow, "dlow"),
            **_numbered(made, "da"),
            **_masks(keys, places, thresholds, factors),
            T=tokens,
            D=width,
            **_numbered(ranks, "R", 0),
            **options,
        )
    return made


@operator("lora_input_gradient")
def _input_gradient(
    frozen: list[Tensor],
    dlow: list[Tensor],
    a: list[Tensor],
    keys: list[Tensor | None],
    places: list[int],
    thresholds: list[int],
    factors: list[float],
) -> Tensor:
    """Compute `sum_g (frozen_g + f_g drop_g(dlow_g A_g))`. frozen: (T, D), of the frozen
    products."""
    tokens, width = frozen[0].shape
    dx = torch.empty_like(frozen[0])
    ranks = [one.shape[1] for one in dlow]
    options = _options("input", ranks, dx.dtype, "BD")
    grid = _count(tokens, options["BT"]), _count(width, options["BD"])
    with on_device_of(dx):
        start(
            input_kernel,
            grid,
            **_numbered(frozen, "frozen"),
            **_numbered(dlow, "dlow"),
            **_numbered([one.contiguous() for one in a], "a"),
            **_masks(keys, places, thresholds, factors),
            dx=dx,
            T=tokens,
            D=width,
            **_numbered(ranks, "R", 0),
            **options,
        )
    return dx


def supports(x: Tensor, parts: Sequence[LowRankPart]) -> bool:
    """Return whether the kernels serve projections of x (T, D).

    They take float32, float16 and bfloat16 on a GPU of compute capability 8.0 or above, in the
    interpreter float32 and float16; up to 3 projections; ranks up to 256, in float32 128; masks
    made by a hash; and at least one token.
    """
    if INTERPRETED:
        known = x.dtype in (torch.float32, torch.float16)
    else:
        known = (
            x.is_cuda
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and torch.cuda.get_device_properties(x.device).major >= 8
        )
    return (
        known
        and x.shape[0] > 0
        and len(parts) <= MAX_GROUP
        and all(
            part.a.shape[0] <= _max_rank(x.dtype)
            and (part.mask is None or isinstance(part.mask, HashMask))
            for part in parts
        )
    )


def _of_masks(parts: Sequence[LowRankPart]) -> tuple[list, list, list, list]:
    """Return the masks as the kernels take them: keys, places, thresholds; and the factors."""
    masks = [part.mask for part in parts]
    return (
        [None if mask is None else mask.elements for mask in masks],
        [0 if mask is None else mask.place for mask in masks],
        [0 if mask is None else mask.threshold for mask in masks],
        [part.factor for part in parts],
    )


def low(x: Tensor, parts: Sequence[LowRankPart]) -> list[Tensor]:
    """Compute `f_g A_g drop_g(x)`, each (T, R_g). x: (T, D)."""
    return _low(x, [part.nearest(x.dtype).a for part in parts], *_of_masks(parts))


def scaled(raw: Tensor, low: Tensor, part: LowRankPart) -> Tensor:
    """Compute `magnitude / norm (raw + low B^T)`, (T, F)."""
    return _scaled(raw, low, part.nearest(raw.dtype).b, part.magnitude, part.norm)


def unscaled(dy: Tensor, raw: Tensor, low: Tensor, part: LowRankPart) -> list[Tensor]:
    """Return the gradients of `scaled`: of what it scales (T, F), of B, of the magnitude."""
    b = part.nearest(raw.dtype).b
    return _unscaled(dy, raw, low, b, part.magnitude, part.norm, part.b.dtype)


def gradients_of_a(x: Tensor, dlow: Sequence[Tensor], parts: Sequence[LowRankPart]) -> list[Tensor]:
    """Compute `f_g dlow_g^T drop_g(x)`, each (R_g, D). dlow: (T, R_g)."""
    return _gradients_of_a(x, list(dlow), [part.a for part in parts], *_of_masks(parts))


def input_gradient(
    frozen: Sequence[Tensor], dlow: Sequence[Tensor], parts: Sequence[LowRankPart]
) -> Tensor:
    """Compute `sum_g (frozen_g + f_g drop_g(dlow_g A_g))`. frozen: (T, D), of the frozen
    products."""
    a = [part.nearest(frozen[0].dtype).a for part in parts]
    return _input_gradient(list(frozen), list(dlow), a, *_of_masks(parts))
