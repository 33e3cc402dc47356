"""Compiles the Triton kernels of linear layers for given cards, on a machine without any.

`python triton_compile_linear.py 8.0 9.0` takes the usual group in bf16, with `all` every table of
block sizes. Prints a line per launch: `fits` or `refused`, its shared memory and spilled registers.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton_cards import recorder

from mixlora_exp.kernels.dropout import HashMask
from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.shapes import Low
from mixlora_exp.kernels.triton import linear_launch as launch

KERNELS = {
    name: value for name, value in vars(launch).items() if isinstance(value, triton.JITFunction)
}


def compile_group(
    card: str,
    dtype: torch.dtype,
    rank: int,
    adapters: torch.dtype | None = None,
    masked: bool = True,
    group: int = 3,
) -> None:
    """One forward and backward pass of 256 tokens, D = F = 1024."""
    title = f"{dtype}, rank {rank}, adapters {adapters or dtype}, masked {masked}, {group} of them"
    for name, kernel in KERNELS.items():
        setattr(launch, name, recorder(kernel, card, title))
    x = torch.empty(256, 1024, dtype=dtype)
    a, b = torch.empty(rank, 1024), torch.empty(1024, rank)
    copies = None if adapters == torch.float32 else Low(a.to(dtype), b.to(dtype))
    mask = HashMask.of(torch.empty(256, dtype=torch.int64), 3, 0.05, 1024) if masked else None
    part = LowRankPart(a, b, 2.0, torch.empty(1024), torch.empty(1024), mask, copies)
    low, *_ = lows = launch.low(x, [part] * group)
    launch.scaled(x, low, part)
    launch.unscaled(x, x, low, part)
    launch.gradients_of_a(x, lows, [part] * group)
    launch.input_gradient([x] * group, lows, [part] * group)


def main(cards: list[str], everything: bool) -> None:
    for card in cards:
        compile_group(card, torch.bfloat16, 80)
        if not everything:
            continue
        for rank in (16, 64, 256):
            compile_group(card, torch.bfloat16, rank)
        compile_group(card, torch.float16, 80, masked=False, group=1)
        compile_group(card, torch.bfloat16, 80, adapters=torch.float32)
        compile_group(card, torch.bfloat16, 256, adapters=torch.float32)
        for rank in (16, 128):
            compile_group(card, torch.float32, rank)


if __name__ == "__main__":
    main([card for card in sys.argv[1:] if card != "all"], "all" in sys.argv)
