"""Operators of the kernels of `ffn`: from the frozen products of gate and up to the hidden state,
and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from mixlora_exp.kernels.triton.ffn import forward_kernel
from mixlora_exp.kernels.triton.ffn_backward import backward_inner_kernel, backward_tokens_kernel
from mixlora_exp.kernels.triton.operators import on_device_of, operator, start
from mixlora_exp.kernels.triton.tiles import padded, splits_of, tiles_of

__all__ = ["Operands", "hidden_backward_inner", "hidden_backward_tokens", "hidden_forward"]


class Operands(NamedTuple):
    """The tensors that all of them take.

    gate, up: (T, F), the frozen products. p1, p3: (T K, R) by row, `A x`; b1, b3: (E, F, R); a2:
    (E, R, F); scale1, scale3: (E, F), DoRA's, of gate, up and down, None without experts or DoRA.
    bias1, bias3: (F,) or None. keys: (T,), of the hidden state's dropout mask, or None. The rest is
    of `order.SlotOrder`.
    """

    gate: torch.Tensor
    up: torch.Tensor
    p1: torch.Tensor | None
    p3: torch.Tensor | None
    b1: torch.Tensor | None
    b3: torch.Tensor | None
    a2: torch.Tensor | None
    scale1: torch.Tensor | None
    scale3: torch.Tensor | None
    bias1: torch.Tensor | None
    bias3: torch.Tensor | None
    keys: torch.Tensor | None
    tokens: torch.Tensor
    weights: torch.Tensor

    @property
    def experts_and_rank(self) -> tuple[int, int]:
        """Number of experts E and rank R."""
        if self.a2 is not None:
            return self.a2.shape[0], self.a2.shape[1]
        b = self.b1 if self.b1 is not None else self.b3
        return b.shape[0], b.shape[2]

    @property
    def low(self) -> tuple[bool, bool, bool]:
        """True for each of gate, up and down that has experts."""
        return self.b1 is not None, self.b3 is not None, self.a2 is not None

    @property
    def plain(self) -> bool:
        """True if gate and up have neither DoRA nor biases."""
        return self.scale1 is self.scale3 is self.bias1 is self.bias3 is None

    def constants(self) -> dict[str, Any]:
        """Return the compile-time constants that all kernels of this block share."""
        low1, low3, low2 = self.low
        rank = self.experts_and_rank[1]
        return {
            "T": self.gate.shape[0],
            "F": self.gate.shape[1],
            "K": self.weights.shape[1],
            "R": rank,
            "RANKS": padded(rank),
            "LOW1": low1,
            "LOW3": low3,
            "LOW2": low2,
            "SCALE1": self.scale1 is not None,
            "SCALE3": self.scale3 is not None,
            "BIAS1": self.bias1 is not None,
            "BIAS3": self.bias3 is not None,
            "DROPPED": self.keys is not None,
        }


def _made(like: torch.Tensor, present: bool, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a fresh tensor; an empty one for what is not present, as operators return no None."""
    return torch.empty(shape if present else 0, dtype=dtype, device=like.device)


@operator("hidden_forward")
def hidden_forward(
    operands: Sequence[torch.Tensor | None],
    experts: torch.Tensor,
    place: int,
    threshold: int,
    factor1: float,
    factor3: float,
    activation: str,
    per_slot: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (hidden, reduced): `sum_k w_k h_k` (T, F), or per slot `h` (T K, F) by row; parts
    (splits, T K, R) of `A2 drop(h)` by row, times w unless per slot, empty without experts on down.

    operands: `Operands`; experts: (T, K) of the order; place, threshold: of the hidden state's
    mask; factor1, factor3: what `B A x` is multiplied by; per_slot: DoRA on down.
    """
    held = Operands(*operands)
    gate, (tokens, inner), top_k = held.gate, held.gate.shape, held.weights.shape[1]
    num_experts, rank = held.experts_and_rank
    columns, plain = top_k * padded(rank), held.plain and not per_slot
    tiles = tiles_of("forward", columns, gate.dtype, gate.device, plain=plain)
    steps, splits = splits_of(tiles, tokens, inner, gate.device)
    rows = tokens * top_k if per_slot else tokens
    hidden = torch.empty((rows, inner), dtype=gate.dtype, device=gate.device)
    reduced = _made(gate, held.low[2], splits, tokens * top_k, rank, dtype=torch.float32)
    with on_device_of(gate):
        start(
            forward_kernel,
            (triton.cdiv(tokens, tiles.rows), splits),
            **held._asdict(),
            experts=experts,
            hidden=hidden,
            reduced=reduced,
            steps=steps,
            place=place,
            threshold=threshold,
            factor1=factor1,
            factor3=factor3,
            E=num_experts,
            ACTIVATION=activation,
            PER_SLOT=per_slot,
            BT=tiles.rows,
            BF=tiles.inner,
            **held.constants(),
            **tiles.options,
        )
    return hidden, reduced


@operator("hidden_backward_tokens", changes=("dgate",))
def hidden_backward_tokens(
    operands: Sequence[torch.Tensor | None],
    experts: torch.Tensor,
    q: torch.Tensor | None,
    dhidden: torch.Tensor,
    dgate: torch.Tensor,
    place: int,
    threshold: int,
    factor1: float,
    factor3: float,
    activation: str,
    per_slot: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dup (T, F), dp1, dp3, dweights), the last three as parts (splits, T K, R) or (splits,
    T K) by row, empty where there is no such gradient.

    dhidden: the gradient of the hidden state through the frozen down product alone, (T, F), or per
    slot (T K, F) by row, then with the row's weight in it. q: (T K, R), what times A2 is the rest.
    dgate: (T, F), is written; it may be dhidden unless per slot: a tile is read and written by one
    program.
    """
    held = Operands(*operands)
    gate, (tokens, inner), top_k = held.gate, held.gate.shape, held.weights.shape[1]
    num_experts, rank = held.experts_and_rank
    columns, plain = top_k * padded(rank), held.plain and not per_slot
    tiles = tiles_of("tokens", columns, gate.dtype, gate.device, plain=plain)
    steps, splits = splits_of(tiles, tokens, inner, gate.device)
    dup = torch.empty_like(held.up)
    rows, full = tokens * top_k, torch.float32
    dp1 = _made(gate, held.low[0], splits, rows, rank, dtype=full)
    dp3 = _made(gate, held.low[1], splits, rows, rank, dtype=full)
    dweights = _made(gate, not per_slot, splits, rows, dtype=full)
    with on_device_of(gate):
        start(
            backward_tokens_kernel,
            (triton.cdiv(tokens, tiles.rows), splits),
            **held._asdict(),
            experts=experts,
            q=q,
            dhidden=dhidden,
            dgate=dgate,
            dup=dup,
            dp1=dp1,
            dp3=dp3,
            dweights=dweights,
            steps=steps,
            place=place,
            threshold=threshold,
            factor1=factor1,
            factor3=factor3,
            E=num_experts,
            ACTIVATION=activation,
            PER_SLOT=per_slot,
            BT=tiles.rows,
            BF=tiles.inner,
            **held.constants(),
            **tiles.options,
        )
    return dup, dp1, dp3, dweights


@operator("hidden_backward_inner")
def hidden_backward_inner(
    operands: Sequence[torch.Tensor | None],
    rows: torch.Tensor,
    starts: torch.Tensor,
    q: torch.Tensor | None,
    dhidden: torch.Tensor,
    norm1: torch.Tensor | None,
    norm3: torch.Tensor | None,
    dtype: torch.dtype,
    place: int,
    threshold: int,
    factor1: float,
    factor3: float,
    activation: str,
    per_slot: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of B of gate and up, A of down and the magnitudes of gate and up, in the
    parameters' layout and `dtype`, empty where there is no such parameter.

    rows, starts: of the order. q, dhidden: as in `hidden_backward_tokens`. norm1, norm3: (E, F).
    """
    held = Operands(*operands)
    gate, inner = held.gate, held.gate.shape[1]
    num_experts, rank = held.experts_and_rank
    tiles = tiles_of("inner", padded(rank), gate.dtype, gate.device)
    low1, low3, low2 = held.low
    db1 = _made(gate, low1, num_experts, inner, rank, dtype=dtype)
    db3 = _made(gate, low3, num_experts, inner, rank, dtype=dtype)
    da2 = _made(gate, low2, num_experts, rank, inner, dtype=dtype)
    dmagnitude1 = _made(gate, norm1 is not None, num_experts, inner, dtype=dtype)
    dmagnitude3 = _made(gate, norm3 is not None, num_experts, inner, dtype=dtype)
    with on_device_of(gate):
        start(
            backward_inner_kernel,
            (triton.cdiv(inner, tiles.inner), num_experts),
            **held._asdict(),
            rows=rows,
            starts=starts,
            q=q,
            dhidden=dhidden,
            norm1=norm1,
            norm3=norm3,
            db1=db1,
            db3=db3,
            da2=da2,
            dmagnitude1=dmagnitude1,
            dmagnitude3=dmagnitude3,
            place=place,
            threshold=threshold,
            factor1=factor1,
            factor3=factor3,
            ACTIVATION=activation,
            PER_SLOT=per_slot,
            BT=tiles.rows,
            BF=tiles.inner,
            **held.constants(),
            **tiles.options,
        )
    return db1, db3, da2, dmagnitude1, dmagnitude3
