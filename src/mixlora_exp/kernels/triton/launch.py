"""Launchers of the Triton kernels of the feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mixlora_exp.kernels.triton.ffn import forward_kernel
from mixlora_exp.kernels.triton.ffn_backward import backward_inner_kernel, backward_tokens_kernel
from mixlora_exp.kernels.triton.tiles import Tiles, default_tiles, padded

__all__ = [
    "Operands",
    "backward_inner",
    "backward_tokens",
    "forward",
]


@dataclass(frozen=True, slots=True)
class Operands:
    """What all kernels take.

    gate, up: (T, F), the frozen products. p: (T, E R of gate, then of up, where they have experts),
    `A x`. b1, b3, a2: (F, E R), B of gate and up, A of down transposed, None without experts.
    scale1, scale3: (E, F), DoRA's scale of gate and up, or None. bias1, bias3: (F,), their biases,
    or None. experts: (T, K); weights: (T, K) float32. kept: (T, F) uint8, 0 where dropout takes the
    hidden state from the low-rank branch, or None. factor1, factor3: what `B A x` is multiplied by.
    per_slot: whether the down projection takes a hidden state per slot.
    """

    gate: Tensor
    up: Tensor
    p: Tensor | None
    b1: Tensor | None
    b3: Tensor | None
    a2: Tensor | None
    scale1: Tensor | None
    scale3: Tensor | None
    bias1: Tensor | None
    bias3: Tensor | None
    experts: Tensor
    weights: Tensor
    kept: Tensor | None
    factor1: float
    factor3: float
    num_experts: int
    rank: int
    activation: str
    per_slot: bool

    @property
    def tokens(self) -> int:
        """T."""
        return self.gate.shape[0]

    @property
    def inner(self) -> int:
        """F."""
        return self.gate.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.experts.shape[1]

    @property
    def columns(self) -> int:
        """E R."""
        return self.num_experts * self.rank

    @property
    def sides(self) -> int:
        """How many of gate and up have experts."""
        return (self.b1 is not None) + (self.b3 is not None)

    def tiles(self, kernel: str) -> Tiles:
        """Those of `default_tiles`."""
        return default_tiles(
            kernel,
            tokens=self.tokens,
            inner=self.inner,
            columns=self.columns,
            top_k=self.top_k,
            dtype=self.gate.dtype,
            device=self.gate.device,
        )

    def arguments(self) -> dict[str, Any]:
        """Of the kernels, but for what differs between them."""
        names = (
            "gate", "up", "p", "b1", "b3", "a2", "scale1", "scale3", "bias1", "bias3", "experts",
            "weights", "kept",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            "T": self.tokens,
            "F": self.inner,
            "factor1": self.factor1,
            "factor3": self.factor3,
            "K": self.top_k,
            "SLOTS": triton.next_power_of_2(self.top_k),
            "R": self.rank,
            "COLUMNS": self.columns,
            "PADDED": padded(self.columns),
            "ACTIVATION": self.activation,
            "LOW1": self.b1 is not None,
            "LOW3": self.b3 is not None,
            "LOW2": self.a2 is not None,
            "SCALE1": self.scale1 is not None,
            "SCALE3": self.scale3 is not None,
            "BIAS1": self.bias1 is not None,
            "BIAS3": self.bias3 is not None,
            "PER_SLOT": self.per_slot,
            "DROPPED": self.kept is not None,
        }


def _split(count: int, splits: int) -> tuple[int, int]:
    """(steps, splits): `count` tiles in that many splits or fewer, none of them empty."""
    steps = triton.cdiv(count, splits)
    return steps, triton.cdiv(count, steps)


def _options(tiles: Tiles) -> dict[str, int]:
    return {
        "BT": tiles.tokens,
        "BF": tiles.inner,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _partial(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _total(parts: Tensor | None) -> Tensor | None:
    """The sum over the splits."""
    if parts is None or len(parts) == 1:
        return None if parts is None else parts[0]
    return parts.sum(dim=0)


def forward(operands: Operands, tiles: Tiles | None = None) -> tuple[Tensor, Tensor | None]:
    """(hidden, reduced). hidden: `sum_k w_k h_k` (T, F), or per slot `h_k` (T, K, F); reduced:
    `A2 drop(h_k)` (T, E R) float32 of all slots side by side, times w_k unless per slot; None
    without experts on the down projection."""
    tiles = tiles or operands.tiles("forward")
    steps, splits = _split(triton.cdiv(operands.inner, tiles.inner), tiles.splits)
    gate = operands.gate
    shape = (operands.tokens, operands.top_k, operands.inner) if operands.per_slot else gate.shape
    hidden = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    reduced = None
    if operands.a2 is not None:
        reduced = _partial(gate, splits, operands.tokens, operands.columns)
    with torch.cuda.device_of(gate):
        forward_kernel[(triton.cdiv(operands.tokens, tiles.tokens), splits)](
            hidden=hidden,
            reduced=reduced,
            steps=steps,
            **operands.arguments(),
            **_options(tiles),
        )
    return hidden, _total(reduced)


def backward_tokens(
    operands: Operands, dhidden: Tensor, q: Tensor | None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dgate (T, F), dup (T, F), dp as p in float32, dweights (T, K) float32).

    dhidden: the gradient of the hidden state through W2 alone, (T, F), which is overwritten; per
    slot (T, K, F), then with the slot's weight in it, and dweights is None. q: (T, E R), what times
    A2 is the rest of that gradient, None without experts on the down projection.
    """
    tiles = tiles or operands.tiles("tokens")
    steps, splits = _split(triton.cdiv(operands.inner, tiles.inner), tiles.splits)
    tokens = operands.tokens
    # A large tensor less at the peak: a tile of `dhidden` is read where its gradient is written.
    dgate = torch.empty_like(operands.gate) if operands.per_slot else dhidden
    dup = torch.empty_like(operands.up)
    dp = dweights = None
    if operands.sides:
        dp = _partial(dup, splits, tokens, operands.sides * operands.columns)
    if not operands.per_slot:
        dweights = _partial(dup, splits, tokens, operands.top_k)
    with torch.cuda.device_of(dup):
        backward_tokens_kernel[(triton.cdiv(tokens, tiles.tokens), splits)](
            q=q,
            dhidden=dhidden,
            dgate=dgate,
            dup=dup,
            dp=dp,
            dweights=dweights,
            steps=steps,
            **operands.arguments(),
            **_options(tiles),
        )
    return dgate, dup, _total(dp), _total(dweights)


def backward_inner(
    operands: Operands, dhidden: Tensor, q: Tensor | None, tiles: Tiles | None = None
) -> dict[str, Tensor | None]:
    """The gradients of b1, b3, a2 (F, E R), and of scale1, scale3 as (F, E), by these names in
    float32, None where there is no such operand. dhidden, q: as in `backward_tokens`."""
    tiles = tiles or operands.tiles("inner")
    steps, splits = _split(triton.cdiv(operands.tokens, tiles.tokens), tiles.splits)
    parts: dict[str, Tensor | None] = {}
    for name in ("b1", "b3", "a2", "scale1", "scale3"):
        width = operands.num_experts if name.startswith("scale") else operands.columns
        present = getattr(operands, name) is not None
        parts[name] = _partial(operands.gate, splits, operands.inner, width) if present else None
    with torch.cuda.device_of(dhidden):
        backward_inner_kernel[(triton.cdiv(operands.inner, tiles.inner), splits)](
            q=q,
            dhidden=dhidden,
            steps=steps,
            E=operands.num_experts,
            EXPERTS=padded(operands.num_experts),
            **{f"d{name}": part for name, part in parts.items()},
            **operands.arguments(),
            **_options(tiles),
        )
    return {name: _total(part) for name, part in parts.items()}
