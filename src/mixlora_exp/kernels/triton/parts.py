"""Functions shared by the feed-forward block's Triton kernels: activations, rows, columns."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "activate",
    "dot",
    "is_met",
    "load_low",
    "load_matrix",
    "next_met",
    "slot_of",
    "store_low",
]

# Triton takes globals as constants only. In products they stand right of the tensor: left of it
# the interpreter makes a constant of the result.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)
TWO_TANH_SCALE = tl.constexpr(1.5957691216057308)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _logistic(x):
    """Return (value, 1 - value) of the logistic function, the second without cancellation."""
    # Beyond 80 the value is 0 in float32 as it is, and an infinite power would give NaN.
    power = tl.exp(tl.minimum(-x, 80.0))
    value = 1.0 / (1.0 + power)
    return value, power * value


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return (value, slope) of the activation."""
    if ACTIVATION == "silu":
        s, rest = _logistic(x)
        value = x * s
        slope = s + value * rest
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(x * SQRT_HALF))
        value = x * below
        slope = below + x * INVERSE_SQRT_TAU * tl.exp(x * x * -0.5)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # (1 + tanh z) / 2 is the logistic function of 2 z.
        cubic = x * x * TANH_CUBIC
        s, rest = _logistic(x * (1.0 + cubic) * TWO_TANH_SCALE)
        value = x * s
        slope = s + value * rest * (1.0 + 3.0 * cubic) * TWO_TANH_SCALE
    return value, slope


@triton.jit
def dot(a, b, total):
    """Compute `total + a b`, or `a b` for None, in float32; float32 operands are not cut to
    tf32."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def slot_of(experts, position, real, k, K: tl.constexpr, E: tl.constexpr):
    """Return (expert, first, end): the experts of slot k by row, E for none, and the range they are
    in.

    experts: (T, K) int32 by sorted position (see `order`).
    """
    expert = tl.load(experts + position * K + k, mask=real, other=E)
    first = tl.min(expert, axis=0)
    end = tl.max(tl.where(expert < E, expert, -1), axis=0) + 1
    return expert, first, end


@triton.jit
def next_met(expert, e, E: tl.constexpr):
    """Return the lowest number in `expert` above e, E for none."""
    return tl.min(tl.where(expert > e, expert, E), axis=0)


@triton.jit
def is_met(mine):
    """Return whether any element of a bool tile is true."""
    return tl.max(mine.to(tl.int32), axis=0) > 0


@triton.jit
def load_matrix(
    matrix,
    expert,
    inner,
    within,
    SIZE,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Return (inner, RANKS): some of the SIZE places of an expert's matrix, its rank padded with
    zeros.

    matrix: (E, SIZE, R), or with ACROSS (E, R, SIZE).
    """
    rank = tl.arange(0, RANKS)
    if ACROSS:
        offsets = rank[None, :] * SIZE + inner[:, None]
    else:
        offsets = inner[:, None] * R + rank[None, :]
    mask = within[:, None] & (rank < R)[None, :]
    return tl.load(matrix + expert * R * SIZE + offsets, mask=mask, other=0.0)


@triton.jit
def load_low(low, row, valid, R: tl.constexpr, RANKS: tl.constexpr):
    """Load rows of a matrix of R columns, padded with zeros to (rows, RANKS)."""
    rank = tl.arange(0, RANKS)
    offsets = row.to(tl.int64)[:, None] * R + rank[None, :]
    return tl.load(low + offsets, mask=valid[:, None] & (rank < R)[None, :], other=0.0)


@triton.jit
def store_low(low, values, row, valid, R: tl.constexpr, RANKS: tl.constexpr):
    """Store `values` (rows, RANKS) into rows of a matrix of R columns, in its dtype."""
    rank = tl.arange(0, RANKS)
    offsets = row.to(tl.int64)[:, None] * R + rank[None, :]
    values = values.to(low.dtype.element_ty)
    tl.store(low + offsets, values, mask=valid[:, None] & (rank < R)[None, :])


INTERPRETED = not isinstance(dot, triton.JITFunction)
"""True if Triton's interpreter runs the kernels, for a machine without a GPU."""
