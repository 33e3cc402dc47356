"""Block sizes of the Triton kernels of the feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["Tiles", "padded", "splits_of", "takes", "tiles_of"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Block sizes of a launch: `rows` (tokens, or rows of an expert) and `inner` of the wide
    columns in a tile, powers of two from 16 on; warps of a program, stages of its loop."""

    rows: int
    inner: int
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a Triton launch: `num_warps`, `num_stages`."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# By kernel and padded columns: those of a row's rank or, for the kernels that sum over F for all
# slots of a token, of K such. They were compiled for compute capabilities 8.0, 8.9 and 9.0: none
# takes more shared memory than a consumer card has or spills more than 8 registers, but for those
# of more than 3 slots, whose sums are too many for the registers, and 12 of `tokens` with two slots
# of rank 128 on 9.0. More rows read the matrices less often, fewer meet fewer experts.
HALF_TILES = {
    "forward": {
        32: Tiles(32, 64),
        64: Tiles(32, 64),
        128: Tiles(32, 64, 8),
        256: Tiles(16, 64, 8),
    },
    "tokens": {
        32: Tiles(32, 64, 8),
        64: Tiles(16, 64),
        128: Tiles(16, 32, 8),
        256: Tiles(16, 32, 8),
    },
    "inner": {32: Tiles(32, 64), 64: Tiles(32, 32), 128: Tiles(32, 32), 256: Tiles(16, 16)},
    "narrow": {32: Tiles(16, 256), 64: Tiles(16, 128), 128: Tiles(16, 64), 256: Tiles(16, 32)},
    "wide": {32: Tiles(32, 128), 64: Tiles(32, 64), 128: Tiles(32, 64), 256: Tiles(16, 32)},
    "matrices": {32: Tiles(64, 64), 64: Tiles(32, 64), 128: Tiles(32, 32), 256: Tiles(16, 16)},
}

# Timed on an H200, at LLaMA-2 7B's shape, E = 8, K = 2, r = 16, MixLoRA in bf16: 257 and 451 us
# where those above take 339 and 652, though 49 and 15 registers are spilled. With biases 89 are,
# with DoRA 130, which was not timed: these have those above.
HOPPER = {("forward", 32): Tiles(64, 64), ("tokens", 32): Tiles(64, 64, 8)}

# float32 products that are not cut to tf32 run outside the tensor cores, each thread with whole
# rows of both operands in registers: small tiles, and ranks of no more than 64.
FULL_TILES = {width: Tiles(16, 16, 8, 1) for width in (32, 64, 128)}
FULL_INNER = {32: Tiles(16, 32, 8, 1)}
FULL_RANK = 64

# Programs per multiprocessor that the loops over F are split for, so that the last wave is a small
# part of the whole.
WAVES = 4


def padded(size: int) -> int:
    """Return the power of two, at least 16 as products need it, that holds `size`."""
    return max(16, triton.next_power_of_2(size))


def takes(rank: int, top_k: int, dtype: torch.dtype) -> bool:
    """Return whether there are tiles for R and K: up to 256 columns, K times the padded rank, or
    half as many in float32, and there a rank of 64."""
    full = dtype == torch.float32
    most = max(FULL_TILES if full else HALF_TILES["forward"])
    return top_k * padded(rank) <= most and not (full and rank > FULL_RANK)


def _card(device: torch.device) -> Any:
    """Return the properties of a GPU; None for one that this machine, which compiles for it, has
    not."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device) if there else None


def tiles_of(
    kernel: str, columns: int, dtype: torch.dtype, device: torch.device, *, plain: bool = False
) -> Tiles:
    """Return the block sizes of a kernel: `forward`, `tokens`, `inner`, or of the kernels of
    `narrow` to columns, from them and of the matrices' gradients. columns: padded. plain: gate and
    up have neither DoRA nor biases, as where the larger tiles of a card were timed."""
    if INTERPRETED:
        # Small, so that small tests have several tiles.
        return Tiles(16, 32, 4, 1)
    table = HALF_TILES[kernel]
    if dtype == torch.float32:
        table = FULL_TILES | FULL_INNER if kernel == "inner" else FULL_TILES
    width, card = max(32, triton.next_power_of_2(columns)), _card(device)
    if plain and dtype == torch.bfloat16 and card is not None and card.major == 9:
        return HOPPER.get((kernel, width), table[width])
    return table[width]


def splits_of(tiles: Tiles, rows: int, inner: int, device: torch.device) -> tuple[int, int]:
    """Return (steps, splits) of the loop over `inner`, so that the programs of few rows fill the
    device: tiles of a split, and splits, none of them empty."""
    programs, loop = triton.cdiv(rows, tiles.rows), triton.cdiv(inner, tiles.inner)
    wanted = 2 * programs
    if not INTERPRETED:
        card = _card(device)
        wanted = WAVES * (132 if card is None else card.multi_processor_count)
    steps = triton.cdiv(loop, min(loop, triton.cdiv(wanted, programs)))
    return steps, triton.cdiv(loop, steps)
