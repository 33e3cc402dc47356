"""Dropout as an explicit mask: drawn once, applied to values and to their gradients.

A kernel that recomputes in its backward pass needs the same mask again, and two kernels can only be
compared under dropout when both are given it. On a CPU, where drawing a number per element takes
longer than the products of a small model, only the dropped elements are drawn: the gaps between
them are geometric, which gives each element its own independent chance as ever.

In training the numbers come from a `DropoutStream`: a mask is then a function of the adapter's
seed, the step and the module alone, whatever else runs in the process.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DropMask", "DropoutKey", "DropoutStream", "draw_mask", "drop"]


@dataclass(slots=True)
class DropoutStream:
    """Where the dropout of one adapter stands: its seed, the optimizer step, the micro-batch within
    it and the process. A trainer sets the last three before each forward pass."""

    seed: int
    step: int = 0
    micro_batch: int = 0
    process: int = 0


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """The stream of an adapter, at one module, named by its place in the model."""

    stream: DropoutStream
    place: str

    def generator(self, part: str, device: torch.device) -> torch.Generator | None:
        """A generator for one mask of this module, the same whenever it is asked for at this point
        of the stream; None while compiling or recording a CUDA graph, where seeds cannot change."""
        if torch.compiler.is_compiling() or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return None
        s = self.stream
        where = struct.pack("<4Q", s.seed, s.step, s.micro_batch, s.process)
        text = f"{self.place}/{part}".encode()
        digest = hashlib.blake2b(where + text, digest_size=4).digest()
        # A CPU's generator takes 32 bits of a seed.
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True, slots=True)
class DropMask:
    """Which elements of a (rows, width) matrix dropout zeroes, and the factor for the others.

    `elements` is either `kept`, (rows, width) bool, or the flat int32 numbers of the dropped ones
    in ascending order: at p = 0.05 that is 0.2 bytes per element of the matrix, where `kept` is 1.
    """

    elements: Tensor
    scale: float
    shape: tuple[int, int]

    @property
    def is_sparse(self) -> bool:
        return self.elements.dim() == 1

    def kept(self) -> Tensor:
        """(rows, width) bool, false where dropped."""
        if not self.is_sparse:
            return self.elements
        kept = torch.ones(self.shape[0] * self.shape[1], dtype=torch.bool)
        kept[self.elements.long()] = False
        return kept.view(self.shape)

    def zero(self, x: Tensor) -> Tensor:
        """`x` with the dropped elements zero and the others as they were, a new tensor.

        Kernels fold `scale` into the factor of a product, which saves a pass over the matrix.
        """
        if self.is_sparse:
            return x.flatten().index_fill(0, self.elements.long(), 0.0).view(x.shape)
        return torch.where(self.elements, x, 0.0)

    def slice(self, start: int, end: int) -> DropMask:
        """The mask of rows `start` to `end`."""
        shape = (end - start, self.shape[1])
        if shape == self.shape:
            return self
        if not self.is_sparse:
            return DropMask(self.elements[start:end], self.scale, shape)
        bounds = torch.tensor([start * shape[1], end * shape[1]], dtype=self.elements.dtype)
        first, last = torch.searchsorted(self.elements, bounds).tolist()
        return DropMask(self.elements[first:last] - start * shape[1], self.scale, shape)


def drop(x: Tensor, mask: DropMask | None, rows: Tensor | None = None) -> Tensor:
    """`x` after dropout by `mask` or, where x holds only some rows of the masked matrix, by those
    rows of it."""
    if mask is None:
        return x
    if rows is None:
        return mask.zero(x) * mask.scale
    return torch.where(mask.kept()[rows], x, 0.0) * mask.scale


def draw_mask(
    shape: tuple[int, int],
    p: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> DropMask | None:
    """Draw the mask of a (rows, width) matrix whose elements are dropped with probability `p`.

    Draws from `generator`, or torch's default one of the device. None for p = 0.
    """
    if p == 0.0:
        return None
    scale = 1.0 / (1.0 - p)
    if device.type == "cpu" and p <= 0.5 and not torch.compiler.is_compiling():
        return DropMask(_draw_dropped(shape[0] * shape[1], p, generator), scale, shape)
    kept = torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(
        1.0 - p, generator=generator
    )
    return DropMask(kept, scale, shape)


def _draw_dropped(count: int, p: float, generator: torch.Generator | None) -> Tensor:
    """Flat numbers of the dropped ones of `count` elements, int32 where that holds them.

    The number of elements between two dropped ones is geometric: floor(log(u) / log(1 - p)).
    """
    chunks, reached = [], -1
    while reached < count:
        expected = (count - reached) * p
        size = int(expected + 5 * math.sqrt(expected) + 16)
        # `1 - u` is never zero. float32 has steps of 2^-24, so gaps end at 324 for p = 0.05,
        # which a longer gap would have with a chance of 6e-8.
        drawn = (1.0 - torch.rand(size, generator=generator)).log_()
        gaps = drawn.mul_(1.0 / math.log1p(-p)).to(torch.int64)
        numbers = gaps.add_(1).cumsum(0).add_(reached)
        chunks.append(numbers)
        reached = int(numbers[-1])
    numbers = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    kind = torch.int32 if count < 2**31 else torch.int64
    return numbers[: int(torch.searchsorted(numbers, count))].to(kind)
