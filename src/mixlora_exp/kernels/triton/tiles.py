"""Block sizes of the Triton kernels of the feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["Tiles", "default_tiles", "max_columns", "padded"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Block sizes of a launch: `tokens` and `inner`, of the F columns, in a tile, powers of two
    with at least 16 inner columns and 16 rows, of which a token has one per slot (K padded);
    `splits` of the loop over the tiles of F or, in `backward_inner`, of T; warps of a program;
    stages of its loop."""

    tokens: int
    inner: int
    splits: int
    warps: int
    stages: int


# Rows, inner, warps and stages, by the padded E R.
#
# A program holds sums of rows * E R (`forward`; twice that in `tokens`) or 3 * inner * E R
# (`inner`) float32 numbers, and the left operands of its products beside them: about half of the
# 255 registers that a thread may have, so tiles shrink as E R grows. Shared memory holds the stages
# of three tiles of inner * E R (in `inner`: rows * E R) and stays below the 99 KB that a program
# may have on a 24 GB consumer card. Compiled for compute capabilities 8.0, 8.9 and 9.0 none of them
# spills more than a few registers.
HALF_TILES = {
    "forward": {
        16: (64, 64, 4, 2),
        32: (64, 64, 4, 2),
        64: (64, 32, 4, 2),
        128: (64, 32, 4, 2),
        256: (32, 32, 8, 2),
        512: (16, 16, 4, 1),
    },
    "tokens": {
        16: (64, 32, 4, 2),
        32: (64, 32, 4, 2),
        64: (64, 32, 4, 2),
        128: (32, 32, 4, 2),
        256: (16, 32, 8, 2),
        512: (16, 16, 8, 1),
    },
    "inner": {
        16: (32, 64, 4, 2),
        32: (32, 64, 4, 2),
        64: (64, 32, 4, 2),
        128: (32, 32, 4, 2),
        256: (16, 16, 8, 2),
        512: (16, 16, 8, 1),
    },
}

# Data-centre cards from Hopper on have 227 KB of shared memory for a program and products that want
# 64 rows; more rows read the experts' matrices less often.
LARGE_CARDS = {(9, 0), (10, 0), (10, 3)}
LARGE_TILES = {
    "forward": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2)},
    "tokens": {128: (64, 32, 4, 2)},
    "inner": {},
}

# float32 products that are not cut to tf32 run outside the tensor cores, each thread with whole
# rows of both operands in registers: small tiles, and no more than 128 columns.
FULL_TILES = {width: (16, 16, 4, 1) for width in (16, 32, 64, 128)}

# Programs per multiprocessor that the loops are split for, so that the last wave is a small part of
# the whole. The sums of `inner` are small beside what it reads, so it can afford more splits.
WAVES = {"forward": 4, "tokens": 4, "inner": 8}


def padded(size: int) -> int:
    """The power of two, at least 16 as products need it, that holds `size`."""
    return max(16, triton.next_power_of_2(size))


def max_columns(dtype: torch.dtype) -> int:
    """The largest E R that the kernels take."""
    return max(FULL_TILES if dtype == torch.float32 else HALF_TILES["forward"])


def default_tiles(
    kernel: str,
    *,
    tokens: int,
    inner: int,
    columns: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tiles:
    """The block sizes of `forward`, `tokens` (`backward_tokens`) or `inner` (`backward_inner`) for
    T, F, E R and K.

    Few tokens (generation) make few programs, so their loops are split until the GPU is full.
    """
    slots = triton.next_power_of_2(top_k)
    if INTERPRETED:
        # Small, so that small tests have several tiles and splits.
        return Tiles(max(1, 16 // slots), 32, 2, 4, 1)
    table = FULL_TILES
    if dtype != torch.float32:
        table = HALF_TILES[kernel]
        if torch.cuda.get_device_capability(device) in LARGE_CARDS:
            table = {**table, **LARGE_TILES[kernel]}
    rows, width, warps, stages = table[padded(columns)]
    rows = min(rows, max(16, slots * triton.next_power_of_2(tokens)))
    height = max(1, rows // slots)
    programs, loop = triton.cdiv(tokens, height), triton.cdiv(inner, width)
    if kernel == "inner":
        programs, loop = loop, programs
    wanted = WAVES[kernel] * torch.cuda.get_device_properties(device).multi_processor_count
    return Tiles(height, width, min(loop, triton.cdiv(wanted, programs)), warps, stages)
