"""A hash of a row's key and a column, which decides about each element without a generator."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 24
"""Number of bits of a hash that decide: a probability is a multiple of 2^-24."""
LOW = 0xFFFFFFFF


def _finish(h: Tensor) -> Tensor:
    """Return the finalizer of MurmurHash3 (Appleby) on the lower 32 bits of int64, in place."""
    h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(LOW)
    h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(LOW)
    return h.bitwise_xor_(h >> 16)


def hash_kept(keys: Tensor, place: int, width: int, threshold: int) -> Tensor:
    """Return (rows, width) bool, false where dropped: `kernels.triton.hashing` in tensor
    operations.

    keys: (rows,) int64; place: which mask it is, in the range of int32; threshold: the probability
    to drop an element, times 2^24.
    """
    return hash_bits(keys, place, width) >= threshold


def hash_bits(keys: Tensor, place: int, width: int) -> Tensor:
    """Return random bits from a hash: (rows, width) int64 below 2^`BITS`. keys: (rows,) int64."""
    first = _finish((keys & LOW) ^ (place & LOW))
    second = _finish(((keys >> 32) & LOW) ^ first)
    columns = torch.arange(width, device=keys.device) * 0x9E3779B9
    h = _finish((first.unsqueeze(1) + columns).bitwise_and_(LOW))
    return _finish(h.bitwise_xor_(second.unsqueeze(1))) >> (32 - BITS)
