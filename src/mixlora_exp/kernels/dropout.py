"""Dropout as an explicit mask, a function of (seed, optimizer step, example, position, module,
part, column) alone: no generator has a state, and no row of a tensor, micro-batch or process
matters.

So a kernel that recomputes in its backward pass finds the same mask again, two kernels can be
compared under dropout, and masks stay the same however examples are packed, batched, halved or
spread over processes. The two forms draw differently, each from the same key:

- on a CPU, where a number per element would take longer than the products of a small model, only
  the dropped elements are drawn. The gaps between them are geometric, which gives each element its
  own independent chance as ever;
- elsewhere a hash decides about each element (`HashMask`). Triton kernels compute it in place, with
  nothing in memory.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from mixlora_exp.kernels.hashing import BITS, LOW, hash_bits, hash_kept

__all__ = [
    "DropMask",
    "DropoutKey",
    "DropoutStream",
    "HashMask",
    "RowIds",
    "draw_mask",
    "drop",
    "hash_kept",
]

HAS_TRITON = find_spec("triton") is not None
INDEX_BYTES = 4
"""Bytes by which a `DropMask` on a CPU names a dropped element; a `HashMask` on a GPU has none."""


def mix(numbers: Tensor) -> Tensor:
    """Return the output function of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64
    bits after which equal steps in the input show no more. numbers: int64; a new tensor."""

    def folded(h: Tensor, by: int) -> Tensor:
        # A shift of int64 copies the sign; the mask makes it that of a number without one.
        return (h >> by).bitwise_and_((1 << (64 - by)) - 1)

    # 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB with a sign.
    h = (numbers ^ folded(numbers, 30)).mul_(-0x40A7B892E31B1A47)
    h.bitwise_xor_(folded(h, 27)).mul_(-0x6B2FB644ECCEEE15)
    return h.bitwise_xor_(folded(h, 31))


def _digest(data: bytes, size: int) -> int:
    """Return `size` bytes of BLAKE2 as an integer with a sign."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little", signed=True)


@dataclass(frozen=True, slots=True)
class RowIds:
    """The rows of a forward pass, in the order of the flattened batch.

    keys: (T,) int64, a hash of (seed, optimizer step, example, position). runs: (N, 4) int64, the
    rows of one example that follow one another: a hash of (seed, step, example), the position of
    the first, its row, and how many there are; None but on a CPU.
    """

    keys: Tensor
    runs: Tensor | None

    @staticmethod
    def of(seed: int, step: int, example: Tensor, position: Tensor) -> RowIds:
        """Return identities of the rows of an optimizer step. example: (T,) int64, the number of
        each row's example in the step, over all micro-batches and processes; position: (T,) int64,
        its place in that example, negative for padding, of which nothing is dropped on a CPU."""
        examples = mix(example + _digest(struct.pack("<qq", seed, step), 8))
        keys = mix(examples + position)
        # Their number would be read back from a GPU.
        drawn = keys.device.type == "cpu"
        return RowIds(keys, _runs(examples, example, position) if drawn else None)


def _runs(hashed: Tensor, example: Tensor, position: Tensor) -> Tensor:
    """Return `RowIds.runs` of rows, each (T,). hashed: the hash of a row's (seed, step,
    example)."""
    follows = (example[1:] == example[:-1]) & (position[1:] == position[:-1] + 1)
    starts = torch.cat([torch.ones(min(1, len(example)), dtype=torch.bool), ~follows])
    first = starts.nonzero().flatten()
    counts = torch.cat([first, torch.tensor([len(example)])]).diff()
    return torch.stack([hashed[first], position[first], first, counts], dim=1)


@dataclass(slots=True)
class DropoutStream:
    """State of one adapter's dropout: its seed, and the rows of the current forward pass, which a
    trainer sets before it with `begin`. Without rows torch's default generator draws."""

    seed: int
    rows: RowIds | None = None
    kept: RowIds | None = None
    """The rows of the current pass that a layer may compute alone; None: all."""

    def begin(
        self, step: int, example: Tensor, position: Tensor, kept: Tensor | None = None
    ) -> None:
        """Name the rows of this adapter in the next forward pass; see `RowIds.of`. kept: (n,)
        int64, the numbers of those that a layer may compute alone."""
        self.rows = RowIds.of(self.seed, step, example, position)
        self.kept = None
        if kept is not None:
            self.kept = RowIds.of(self.seed, step, example[kept], position[kept])

    def of(self, count: int) -> RowIds | None:
        """Return the rows of a matrix with as many: all or, if there are fewer, the kept ones."""
        if self.kept is not None and count == len(self.kept.keys):
            return self.kept
        return self.rows


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """The stream of an adapter, at one module, named by its place in the model."""

    stream: DropoutStream
    place: str
    device: torch.device | str = "cpu"
    """The device on which compiled models draw masks."""
    _numbers: dict[str, int] = field(default_factory=dict, init=False, compare=False)
    _held: dict[str, Tensor] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        # Tensors of the usual parts: as numbers they would be part of a compiled layer's code, and
        # each layer would be compiled for itself.
        for part in ("input", "hidden", "router"):
            self._held[part] = torch.tensor(self.number(part) & LOW, device=self.device)

    def mask(
        self,
        part: str,
        shape: tuple[int, int],
        p: float,
        device: torch.device,
        rows: Tensor | None = None,
        *,
        hashed: bool = False,
    ) -> DropMask | None:
        """Return the mask of one (rows, width) input of this module, the same at each call in this
        forward pass, eager or compiled; None for p = 0.

        part: names the mask among those of the module. rows: (n,) int64, the rows of the pass that
        the matrix has, None for all. hashed: give a `HashMask` on a CPU too.

        Raises:
            ValueError: the pass has another number of rows than the matrix.
        """
        ids = self.stream.of(shape[0]) if rows is None else self.stream.rows
        if p == 0.0 or ids is None:
            return draw_mask(shape, p, device, hashed=hashed)
        count = len(ids.keys) if rows is None else len(rows)
        if count != shape[0]:
            raise ValueError(
                f"the dropout stream has {count} rows, and {self.place} has {shape[0]}"
            )
        compiling = torch.compiler.is_compiling()
        if hashed or ids.runs is None:
            keys = ids.keys if rows is None else ids.keys[rows]
            if compiling:
                # As `hash_kept` begins.
                return HashMask.of(keys ^ self._held[part], 0, p, shape[1])
            return HashMask.of(keys, self.number(part), p, shape[1])
        scale, whole = 1.0 / (1.0 - p), (len(ids.keys), shape[1])
        if compiling:
            mask = DropMask(_kept(ids.runs, self._held[part], *whole, p), scale, whole)
        else:
            mask = DropMask(_dropped(ids.runs, self.number(part), shape[1], p), scale, whole)
            if p > 0.5:
                mask = DropMask(mask.kept(), scale, whole)
        return mask if rows is None else DropMask(mask.kept()[rows], scale, shape)

    def uniform(self, part: str, width: int) -> Tensor | None:
        """Return numbers of [0, 1) for the rows of the pass, (rows, width) float32, a function of
        what masks are a function of; None where the rows have no names."""
        ids = self.stream.rows
        if ids is None:
            return None
        return hash_bits(ids.keys ^ self._held[part], 0, width).float() / 2**BITS

    def number(self, part: str) -> int:
        """Return the hash seed of a part of this module, int32."""
        if part not in self._numbers:
            self._numbers[part] = _digest(f"{self.place}/{part}".encode(), 4)
        return self._numbers[part]


@dataclass(frozen=True, slots=True)
class DropMask:
    """The elements of a (rows, width) matrix that dropout zeroes, and the factor for the others.

    `elements` is either `kept`, (rows, width) bool, or the flat int32 numbers of the dropped ones
    in ascending order: at p = 0.05 that is 0.2 bytes per element of the matrix, where `kept` is 1.
    """

    elements: Tensor
    scale: float
    shape: tuple[int, int]

    @property
    def described(self) -> tuple:
        """All but the tensor, for `rebuilt`."""
        return (self.scale, self.shape)

    @staticmethod
    def rebuilt(elements: Tensor, described: tuple) -> DropMask:
        """Return the mask of which these are `elements` and `described`."""
        kind = DropMask if len(described) == 2 else HashMask
        return kind(elements, *described)

    @property
    def is_sparse(self) -> bool:
        """True if `elements` lists the dropped elements; else it is the matrix of kept ones."""
        return self.elements.dim() == 1

    def kept(self) -> Tensor:
        """Return (rows, width) bool, false where dropped."""
        if not self.is_sparse:
            return self.elements
        kept = torch.ones(self.shape[0] * self.shape[1], dtype=torch.bool)
        kept[self.elements.long()] = False
        return kept.view(self.shape)

    def zero(self, x: Tensor) -> Tensor:
        """Return `x` with the dropped elements zero and the others as they were, a new tensor.

        Kernels fold `scale` into the factor of a product, which saves a pass over the matrix.
        """
        if self.is_sparse:
            return x.flatten().index_fill(0, self.elements.long(), 0.0).view(x.shape)
        return torch.where(self.elements, x, 0.0)

    def slice(self, start: int, end: int) -> DropMask:
        """Return the mask of rows `start` to `end`."""
        shape = (end - start, self.shape[1])
        if shape == self.shape:
            return self
        if not self.is_sparse:
            return DropMask(self.elements[start:end], self.scale, shape)
        bounds = torch.tensor([start * shape[1], end * shape[1]], dtype=self.elements.dtype)
        first, last = torch.searchsorted(self.elements, bounds).tolist()
        return DropMask(self.elements[first:last] - start * shape[1], self.scale, shape)


@dataclass(frozen=True, slots=True)
class HashMask(DropMask):
    """A mask that is computed where it is needed: `elements` (rows,) int64 are keys of the rows.

    `place`, in the range of int32, tells the masks of equal keys apart. Triton kernels take
    `elements`, `place` and `threshold` (see `kernels.triton.hashing`).
    """

    place: int

    @staticmethod
    def of(keys: Tensor, place: int, p: float, width: int) -> HashMask:
        """Return the mask of rows by their keys. keys: (rows,) int64; p: the probability to drop an
        element."""
        return HashMask(keys, 1.0 / (1.0 - p), (len(keys), width), place)

    @property
    def described(self) -> tuple:
        """All but the keys, for `rebuilt`: scale, shape, place."""
        return (self.scale, self.shape, self.place)

    @property
    def threshold(self) -> int:
        """An element is kept if the upper bits of its hash are at least this: p 2^24."""
        return round((1.0 - 1.0 / self.scale) * 2**BITS)

    @property
    def is_sparse(self) -> bool:
        """False: the mask is made as a matrix."""
        return False

    def kept(self) -> Tensor:
        """Compute the mask: (rows, width) bool, false where dropped."""
        made = hash_kept
        if self.elements.is_cuda and HAS_TRITON:
            # Not before it is used: Triton is missing on many machines.
            from mixlora_exp.kernels.triton.hashing import kept_matrix as made
        return made(self.elements, self.place, self.shape[1], self.threshold)

    def zero(self, x: Tensor) -> Tensor:
        """Return a new tensor: `x` (rows, width) with its dropped elements zero."""
        return torch.where(self.kept(), x, 0.0)

    def slice(self, start: int, end: int) -> HashMask:
        """Return the mask of rows `start` to `end`, from their keys."""
        shape = (end - start, self.shape[1])
        return HashMask(self.elements[start:end], self.scale, shape, self.place)


def drop(x: Tensor, mask: DropMask | None, rows: Tensor | None = None) -> Tensor:
    """Return `x` after dropout by `mask` or, where x holds only some rows of the masked matrix, by
    those rows of it."""
    if mask is None:
        return x
    if rows is None:
        return mask.zero(x) * mask.scale
    return torch.where(mask.kept()[rows], x, 0.0) * mask.scale


def draw_mask(
    shape: tuple[int, int], p: float, device: torch.device, *, hashed: bool = False
) -> DropMask | None:
    """Draw the mask of a (rows, width) matrix whose elements are dropped with probability `p` from
    torch's default generator of the device. None for p = 0. hashed: a `HashMask` on a CPU too."""
    if p == 0.0:
        return None
    scale = 1.0 / (1.0 - p)
    if hashed or device.type != "cpu":
        keys = torch.randint(-(2**63), 2**63 - 1, (shape[0],), device=device)
        return HashMask.of(keys, 0, p, shape[1])
    if torch.compiler.is_compiling():
        # Not `bernoulli_`, which the compiler does not fuse.
        return DropMask(torch.rand(shape) >= p, scale, shape)
    seed = torch.randint(2**62, (1,))
    runs = torch.cat([seed, torch.tensor([0, 0, shape[0]])]).unsqueeze(0)
    mask = DropMask(_dropped(runs, 0, shape[1], p), scale, shape)
    return mask if p <= 0.5 else DropMask(mask.kept(), scale, shape)


MARGIN = 5.0
"""Standard deviations by which more numbers are drawn than a run is expected to need."""


def _dropped(runs: Tensor, place: int, width: int, p: float) -> Tensor:
    """Return flat numbers of the dropped elements of a (rows, width) matrix, ascending; int32 where
    that holds them easily.

    runs: (N, 4) as of `RowIds`. The number of elements between two dropped ones of an example is
    geometric: floor(log(u) / log(1 - p)). A run draws from position 0, whatever its first position,
    and more numbers where the first do not reach its end: either way the numbers before are equal.
    """
    listed = runs.tolist()
    ends = [(position + count) * width for _, position, _, count in listed]
    last = max((run[2] + run[3] for run in listed), default=0)
    # The numbers drawn go beyond the end: by gaps of up to 17 / p, and twice as far at the worst.
    most = max([last * width, *(4 * end + 2000 / p for end in ends)])
    kind = torch.int32 if most < 2**31 else torch.int64
    if not listed or width == 0:
        return torch.empty(0, dtype=kind)
    size = max(ends) * p
    size = max(1, int(size + MARGIN * math.sqrt(max(size, 0.0)) + 16))
    seeds = [_seed(key, place) for key, *_ in listed]
    limits = torch.tensor(ends, dtype=kind).unsqueeze(1)
    while True:
        drawn = torch.empty(len(listed), size)
        for row, seed in zip(drawn, seeds, strict=True):
            torch.rand(size, generator=torch.Generator().manual_seed(seed), out=row)
        # `1 - u` is never zero. float32 has steps of 2^-24, so gaps end at 324 for p = 0.05,
        # which a longer gap would have with a chance of 6e-8.
        gaps = drawn.neg_().add_(1.0).log_().mul_(1.0 / math.log1p(-p)).to(kind)
        numbers = gaps.add_(1).cumsum(1, dtype=kind).sub_(1)
        if bool((numbers[:, -1:] >= limits).all()):
            break
        size *= 2
    stops = torch.searchsorted(numbers, limits).flatten().tolist()
    found = []
    for (_, position, row, _), own, stop in zip(listed, numbers, stops, strict=True):
        skipped = position * width
        start = 0 if skipped <= 0 else int(torch.searchsorted(own, skipped))
        found.append(own[start:stop] + (row * width - skipped))
    return (torch.cat(found) if len(found) > 1 else found[0]).to(kind)


def _seed(key: int, place: int) -> int:
    """Return 32 bits, as many as a CPU's generator takes, of a run's key and a mask's place."""
    h = (key ^ (place * 0x9E3779B97F4A7C15)) & 0xFFFFFFFFFFFFFFFF
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (h ^ (h >> 32)) & LOW


@torch.library.custom_op("mixlora::kept", mutates_args=())
def _kept(runs: Tensor, place: Tensor, rows: int, width: int, p: float) -> Tensor:
    """Return `_dropped` as (rows, width) bool, so that a compiled model has the masks of an eager
    one."""
    number = int(place)
    number -= (number & (LOW + 1) // 2) * 2
    return DropMask(_dropped(runs, number, width, p), 1.0, (rows, width)).kept()


@_kept.register_fake
def _(runs: Tensor, place: Tensor, rows: int, width: int, p: float) -> Tensor:
    return torch.empty((rows, width), dtype=torch.bool)
