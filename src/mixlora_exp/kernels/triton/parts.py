"""What the Triton kernels of the feed-forward block share: activations, rows, stacked columns."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "activate",
    "add_slots",
    "dot",
    "load_columns",
    "own",
    "spread",
    "spread_columns",
    "store_columns",
]

# Triton takes globals as constants only. In products they stand right of the tensor: left of it
# the interpreter makes a constant of the result.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)
TWO_TANH_SCALE = tl.constexpr(1.5957691216057308)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _logistic(x):
    """(value, 1 - value) of the logistic function, the second without cancellation."""
    # Beyond 80 the value is 0 in float32 as it is, and an infinite power would give NaN.
    power = tl.exp(tl.minimum(-x, 80.0))
    value = 1.0 / (1.0 + power)
    return value, power * value


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """(value, slope) of the activation."""
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
    """`total + a b`, or `a b` for None, in float32; float32 operands are not cut to tf32."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_columns(
    pointer, row, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """(rows, PADDED): rows of a matrix of WIDTH columns, 0 where there is none."""
    column = tl.arange(0, PADDED)
    offsets = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    return tl.load(pointer + offsets, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_columns(
    pointer, values, row, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """The opposite of `load_columns`."""
    column = tl.arange(0, PADDED)
    offsets = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
    tl.store(pointer + offsets, values, mask=valid[:, None] & (column < WIDTH)[None, :])


@triton.jit
def own(values, expert, R: tl.constexpr, PADDED: tl.constexpr):
    """`values` (rows, PADDED) with the columns of other experts zero. expert: (rows,), -1 for none.

    By `where`, never by a product: 0 * NaN would let in what stands in another expert's columns.
    A column of the padding belongs to expert E or above, so to nobody.
    """
    owner = tl.arange(0, PADDED) // R
    return tl.where(expert[:, None] == owner[None, :], values, 0.0)


@triton.jit
def spread(values, BT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """(BT SLOTS, WIDTH): each token's values for all its rows. values: (BT, WIDTH)."""
    if SLOTS == 1:
        return values
    copies = tl.broadcast_to(tl.reshape(values, (BT, 1, WIDTH)), (BT, SLOTS, WIDTH))
    return tl.reshape(copies, (BT * SLOTS, WIDTH))


@triton.jit
def spread_columns(values, BT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """(WIDTH, BT SLOTS): the same with a token's values in a column. values: (WIDTH, BT)."""
    if SLOTS == 1:
        return values
    copies = tl.broadcast_to(tl.reshape(values, (WIDTH, BT, 1)), (WIDTH, BT, SLOTS))
    return tl.reshape(copies, (WIDTH, BT * SLOTS))


@triton.jit
def add_slots(values, BT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """(BT, WIDTH): the sum over each token's rows. values: (BT SLOTS, WIDTH)."""
    if SLOTS == 1:
        return values
    return tl.sum(tl.reshape(values, (BT, SLOTS, WIDTH)), axis=1)


INTERPRETED = not isinstance(dot, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, for a machine without a GPU."""
