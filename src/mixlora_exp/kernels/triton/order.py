"""The order in which the kernels of the block visit tokens and slots: sorted by experts.

Tokens of the same experts are neighbours, so that a tile of them meets few experts and the products
with their low-rank matrices are as deep as one expert's rank. Sorted by counting, in two launches:
nothing is read back to the host, there are no atomics, and equal keys keep the order of the tokens,
so the same routing gives the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mixlora_exp.kernels.triton.operators import on_device_of, operator, start

__all__ = ["SlotOrder", "order"]

TILE = 64
MOST_KEYS = 1024


class SlotOrder(NamedTuple):
    """A routing of T tokens to K of E experts in sorted order. Position i of the order is a token;
    its slots ascend by expert, empty ones last; row `i K + k` is slot k of position i.

    tokens: (T,) int32, by position. experts: (T, K) int32 by row, E in an empty slot. weights:
    (T, K) float32 by row, 0 in an empty slot. slots: (T, K) int32 by row, the slot's number in the
    routing. rows: (T K,) int32, the rows of one expert after another's; those of expert e are at
    `starts[e]` to `starts[e + 1]`. starts: (E + 1,) int32.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor


@triton.jit
def _expert(experts, weights, token, real, k, K: tl.constexpr, E: tl.constexpr):
    """Return the expert of slot k, E if the slot is empty."""
    weight = tl.load(weights + token * K + k, mask=real, other=0.0).to(tl.float32)
    filled = real & (weight != 0.0)
    return tl.load(experts + token * K + k, mask=filled, other=E).to(tl.int32)


@triton.jit
def _rank(experts, weights, token, real, expert, k, K: tl.constexpr, E: tl.constexpr):
    """Return the place of slot k, with this expert, among the token's slots in ascending order."""
    rank = tl.zeros_like(expert)
    for other in range(K):
        theirs = _expert(experts, weights, token, real, other, K, E)
        before = (theirs < expert) | ((theirs == expert) & (other < k))
        rank += before.to(tl.int32)
    return rank


@triton.jit
def _key(experts, weights, token, real, K: tl.constexpr, E: tl.constexpr, DIGITS: tl.constexpr):
    """Return the token's first DIGITS experts in ascending order as digits of a number."""
    key = tl.zeros_like(token)
    for digit in range(DIGITS):
        key *= E + 1
        for k in range(K):
            expert = _expert(experts, weights, token, real, k, K, E)
            rank = _rank(experts, weights, token, real, expert, k, K, E)
            key += tl.where(rank == digit, expert, 0)
    return key


@triton.jit(do_not_specialize=["T", "tiles"])
def count_kernel(
    experts,
    weights,
    counts,
    T,
    tiles,
    K: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    DIGITS: tl.constexpr,
    KEYS: tl.constexpr,
    BT: tl.constexpr,
    BINS: tl.constexpr,
):
    """counts (KEYS + E, tiles) int32: how many tokens of each tile have each key, and then how many
    slots have each expert. EXPERTS is E padded. Grid: (token tiles,)."""
    tile = tl.program_id(0)
    token = tile * BT + tl.arange(0, BT)
    real = token < T
    key = tl.where(real, _key(experts, weights, token, real, K, E, DIGITS), -1)
    for first in range(0, KEYS, BINS):
        number = first + tl.arange(0, BINS)
        found = tl.sum((key[:, None] == number[None, :]).to(tl.int32), axis=0)
        tl.store(counts + number * tiles + tile, found, mask=number < KEYS)
    number = tl.arange(0, EXPERTS)
    found = tl.zeros((EXPERTS,), tl.int32)
    for k in range(K):
        expert = _expert(experts, weights, token, real, k, K, E)
        found += tl.sum((expert[:, None] == number[None, :]).to(tl.int32), axis=0)
    tl.store(counts + (KEYS + number) * tiles + tile, found, mask=number < E)


@triton.jit
def _before(counts, target, size, BINS: tl.constexpr):
    """Return the sum of the first `target` of `size` counts, by element of `target`."""
    total = tl.zeros_like(target)
    for first in range(0, size, BINS):
        place = first + tl.arange(0, BINS)
        count = tl.load(counts + place, mask=place < size, other=0)
        total += tl.sum(tl.where(place[None, :] < target[:, None], count[None, :], 0), axis=1)
    return total


@triton.jit(do_not_specialize=["T", "tiles"])
def place_kernel(
    experts,
    weights,
    counts,
    tokens,
    sorted_experts,
    sorted_weights,
    slots,
    rows,
    starts,
    T,
    tiles,
    K: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    DIGITS: tl.constexpr,
    KEYS: tl.constexpr,
    BT: tl.constexpr,
    BINS: tl.constexpr,
):
    """The parts of `SlotOrder` from the routing and the counts of `count_kernel`.
    Grid: (token tiles,)."""
    tile = tl.program_id(0)
    index = tl.arange(0, BT)
    token = tile * BT + index
    real = token < T
    key = tl.where(real, _key(experts, weights, token, real, K, E, DIGITS), -1)
    earlier = index[None, :] < index[:, None]
    position = _before(counts, key * tiles + tile, KEYS * tiles, BINS)
    position += tl.sum((earlier & (key[None, :] == key[:, None])).to(tl.int32), axis=1)
    tl.store(tokens + position, token, mask=real)
    counts += KEYS * tiles
    for k in range(K):
        expert = _expert(experts, weights, token, real, k, K, E)
        rank = _rank(experts, weights, token, real, expert, k, K, E)
        row = position * K + rank
        filled = expert < E
        weight = tl.load(weights + token * K + k, mask=filled, other=0.0).to(tl.float32)
        tl.store(sorted_experts + row, expert, mask=real)
        tl.store(sorted_weights + row, weight, mask=real)
        tl.store(slots + row, tl.zeros_like(row) + k, mask=real)
        place = _before(counts, expert * tiles + tile, E * tiles, BINS)
        for other in range(K):
            theirs = _expert(experts, weights, token, real, other, K, E)
            same = earlier & (theirs[None, :] == expert[:, None])
            place += tl.sum(same.to(tl.int32), axis=1)
        tl.store(rows + place, row, mask=filled)
    if tile == 0:
        number = tl.arange(0, EXPERTS)
        first = _before(counts, number * tiles, E * tiles, BINS)
        tl.store(starts + number, first, mask=number <= E)


@operator("order")
def _order(
    experts: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count, top_k = experts.shape
    digits = 1
    while digits < min(top_k, 3) and (num_experts + 1) ** (digits + 1) <= MOST_KEYS:
        digits += 1
    keys, tiles = (num_experts + 1) ** digits, triton.cdiv(count, TILE)

    def make(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=experts.device)

    shape = (count, top_k)
    made = SlotOrder(
        make(count),
        make(*shape),
        make(*shape, dtype=torch.float32),
        make(*shape),
        make(count * top_k),
        make(num_experts + 1),
    )
    counts = make((keys + num_experts) * tiles)
    constants = {
        "T": count,
        "tiles": tiles,
        "K": top_k,
        "E": num_experts,
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
        "DIGITS": digits,
        "KEYS": keys,
        "BT": TILE,
        "BINS": 64,
        "num_warps": 8,
    }
    with on_device_of(experts):
        start(count_kernel, (tiles,), experts, weights, counts, **constants)
        start(place_kernel, (tiles,), experts, weights, counts, *made, **constants)
    return tuple(made)


def order(experts: torch.Tensor, weights: torch.Tensor, num_experts: int) -> SlotOrder:
    """Return the order of a routing. experts: (T, K) int64; weights: (T, K), 0 in an empty slot."""
    return SlotOrder(*_order(experts.contiguous(), weights.contiguous(), num_experts))
