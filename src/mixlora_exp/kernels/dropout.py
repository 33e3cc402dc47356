"""Dropout as an explicit mask: drawn once, applied to values and to their gradients.

A kernel that recomputes in its backward pass needs the same mask again, and two kernels can only be
compared under dropout when both are given it. On a CPU, where drawing a number per element takes
longer than the products of a small model, only the dropped elements are drawn: the gaps between
them are geometric, which gives each element its own independent chance as ever.

In training the numbers come from a `DropoutStream`: a mask is then a function of the adapter's
seed, the step and the module alone, whatever else runs in the process. Where the batch tells which
example and position each row is (`RowIds`), each row's mask is a function of these too, and so the
same however examples are packed, batched or spread over processes.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DropMask",
    "DropoutKey",
    "DropoutStream",
    "RowIds",
    "draw_mask",
    "draw_row_mask",
    "drop",
]


@dataclass(frozen=True, slots=True)
class RowIds:
    """What the rows of a forward pass are, in the order of the flattened batch.

    example: (T,) int64, the number of the row's example in the optimizer step, over all its
    micro-batches and processes; position: (T,) int64, the row's place in that example.
    """

    example: Tensor
    position: Tensor


@dataclass(slots=True)
class DropoutStream:
    """State of one adapter's dropout: its seed, the optimizer step, the micro-batch within
    it and the process. A trainer sets the last three before each forward pass or, better, `rows`:
    then micro-batch and process play no part. `rows` are those of this adapter alone."""

    seed: int
    step: int = 0
    micro_batch: int = 0
    process: int = 0
    rows: RowIds | None = None


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """The stream of an adapter, at one module, named by its place in the model."""

    stream: DropoutStream
    place: str

    def mask(
        self,
        part: str,
        shape: tuple[int, int],
        p: float,
        device: torch.device,
        rows: Tensor | None = None,
    ) -> DropMask | None:
        """The mask of one (rows, width) input of this module, the same whenever it is asked for at
        this point of the stream; None for p = 0.

        part: tells the module's masks apart. rows: the numbers of the pass's rows that the matrix
        has, None for all. While a graph is compiled or captured, where seeds cannot change, torch's
        default generator draws.

        Raises:
            ValueError: the stream has another number of rows than the matrix.
        """
        ids = self.stream.rows
        if p == 0.0 or _is_captured(device):
            return draw_mask(shape, p, device)
        if ids is None:
            # A CPU's generator takes 32 bits of a seed.
            seed = self._number(part, self.stream.micro_batch, self.stream.process) & 0xFFFFFFFF
            return draw_mask(shape, p, device, torch.Generator(device).manual_seed(seed))
        example, position = ids.example.to(device), ids.position.to(device)
        if rows is not None:
            example, position = example[rows], position[rows]
        if len(example) != shape[0]:
            raise ValueError(
                f"DropoutStream.rows has {len(example)} rows, and {self.place} has {shape[0]}"
            )
        keys = mix(mix(example + self._number(part)) + position)
        return draw_row_mask(keys, shape[1], p)

    def _number(self, part: str, *more: int) -> int:
        """64 bits, signed, that stand for seed, step, place, part and `more`."""
        numbers = (self.stream.seed, self.stream.step, *more)
        text = struct.pack(f"<{len(numbers)}Q", *numbers) + f"{self.place}/{part}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def _is_captured(device: torch.device) -> bool:
    return torch.compiler.is_compiling() or (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )


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


def mix(numbers: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014), a hash of 64 bits: a
    bijection after which equal steps in the input show no more. numbers: int64; a new tensor."""

    def folded(h: Tensor, by: int) -> Tensor:
        # A shift of int64 copies the sign; the mask makes it that of a number without one.
        return (h >> by).bitwise_and_((1 << (64 - by)) - 1)

    # 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB with a sign.
    h = (numbers ^ folded(numbers, 30)).mul_(-0x40A7B892E31B1A47)
    h.bitwise_xor_(folded(h, 27)).mul_(-0x6B2FB644ECCEEE15)
    return h.bitwise_xor_(folded(h, 31))


GOLDEN = -0x61C8864680B583EB
"""2^64 over the golden ratio, with a sign: how far the counters of a row stand apart."""


def draw_row_mask(keys: Tensor, width: int, p: float) -> DropMask:
    """The mask of a (rows, width) matrix of which each row's part depends on its key alone.

    keys: (rows,) int64, as of `mix`. The i-th number of a row is `mix(key + i GOLDEN)`. On a CPU it
    gives the gap before the row's next dropped element, as in `draw_mask`; elsewhere, and for
    p > 0.5, whether element i is dropped, so that nothing is read back to the host.
    """
    scale, shape = 1.0 / (1.0 - p), (len(keys), width)

    def numbers(first: int, end: int) -> Tensor:
        """Numbers first to end of every row, of which 24 bits are taken."""
        counters = torch.arange(first, end, device=keys.device) * GOLDEN
        return mix(keys.unsqueeze(1) + counters).bitwise_and_(2**24 - 1)

    if keys.device.type != "cpu" or p > 0.5:
        return DropMask(numbers(0, width) >= round(p * 2**24), scale, shape)
    size = int(width * p + 5 * math.sqrt(width * p) + 16)
    # The places of one row after another: with the row's start added, those in the flat matrix.
    starts = torch.arange(len(keys)).unsqueeze(1) * width
    chunks, drawn, last = [], 0, starts - 1
    while len(keys) and bool((last < starts + width).any()):
        logs = numbers(drawn, drawn + size).float().add_(1.0).mul_(2.0**-24).log_()
        gaps = logs.mul_(1.0 / math.log1p(-p)).to(torch.int64).add_(1)
        gaps[:, :1] += last
        places = gaps.cumsum(1)
        chunks.append(places)
        last, drawn = places[:, -1:], drawn + size
    flat = torch.cat(chunks, dim=1) if len(chunks) > 1 else chunks[0] if chunks else starts
    kind = torch.int32 if len(keys) * width < 2**31 else torch.int64
    return DropMask(flat[flat < starts + width].to(kind), scale, shape)
