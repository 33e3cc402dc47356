"""Dropout inside Triton kernels: whether an element is kept, by a hash of its row's key and column.

The same as `kernels.dropout.hash_kept` in tensor operations, to the bit: a kernel needs no mask in
memory, and its backward pass finds the mask of its forward pass again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixlora_exp.kernels.triton.operators import on_device_of, operator, start

__all__ = ["kept", "kept_matrix", "row_hash"]


@triton.jit
def _finish(h):
    """Return the finalizer of MurmurHash3 (Appleby), a bijection of 32 bits: each input bit flips
    each output bit in about half of all cases. h: uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_hash(keys, row, valid, place):
    """Return (first, second), uint32 by row: what `kept` needs of each row.

    keys: pointer to int64, one per row of the matrix; row: the rows' numbers; valid: where to read;
    place: int32, which mask it is. Needed once per program and row.
    """
    key = tl.load(keys + row, mask=valid, other=0)
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    # Not `place.to`: a compiler that looks into the kernel has Python numbers here.
    first = _finish(low ^ tl.cast(place, tl.uint32))
    return first, _finish(high ^ first)


@triton.jit
def kept(first, second, column, threshold):
    """Return whether dropout keeps each element, bool in the shape that the arguments broadcast to.

    first, second: of `row_hash`; column: the element's number in its row; threshold: the
    probability to drop it, times 2^24.
    """
    h = _finish(first + column.to(tl.uint32) * 0x9E3779B9)
    return (_finish(h ^ second) >> 8) >= tl.cast(threshold, tl.uint32)


@triton.jit(do_not_specialize=["T", "place", "threshold"])
def _matrix_kernel(keys, out, T, W, place, threshold, BT: tl.constexpr, BW: tl.constexpr):
    """Store the kept elements of a hashed mask. Grid: (row tiles, column tiles)."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    first, second = row_hash(keys, row, row < T, place)
    keep = kept(first[:, None], second[:, None], column[None, :], threshold)
    inside = (row < T)[:, None] & (column < W)[None, :]
    offsets = row.to(tl.int64)[:, None] * W + column[None, :]
    tl.store(out + offsets, keep.to(tl.int1), mask=inside)


@operator("hash_kept")
def kept_matrix(keys: Tensor, place: int, width: int, threshold: int) -> Tensor:
    """Return `kernels.dropout.hash_kept` in one launch: (rows, width) bool, false where dropped."""
    out = torch.empty((len(keys), width), dtype=torch.bool, device=keys.device)
    if out.numel():
        grid = (triton.cdiv(len(keys), 16), triton.cdiv(width, 256))
        with on_device_of(keys):
            start(
                _matrix_kernel, grid, keys, out, len(keys), width, place, threshold, BT=16, BW=256
            )
    return out
