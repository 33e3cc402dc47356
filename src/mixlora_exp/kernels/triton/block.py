"""The exact kernel with the experts' part fused by Triton: the frozen products stay with torch.

Kept for the backward pass are x, W1 x, W3 x, the routing's order and R columns per row; DoRA on the
down projection also keeps its K outputs. Nothing is read back to the host and no shape depends on
the data, so it can be captured in a CUDA graph and compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.activations import NAMES
from mixlora_exp.kernels.dropout import HashMask
from mixlora_exp.kernels.mixlora.dense import dense_stage
from mixlora_exp.kernels.mixlora.packing import Spec, pack, unpack
from mixlora_exp.kernels.mixlora.stage import add_down_bias, run_stage
from mixlora_exp.kernels.shapes import ROLES, FeedForward, Low, LowRank, Routing, low_ranks
from mixlora_exp.kernels.triton.columns import from_columns, matrix_gradients, to_columns
from mixlora_exp.kernels.triton.hidden import (
    Operands,
    hidden_backward_inner,
    hidden_backward_tokens,
    hidden_forward,
)
from mixlora_exp.kernels.triton.order import SlotOrder, order
from mixlora_exp.kernels.triton.parts import INTERPRETED
from mixlora_exp.kernels.triton.scaled import (
    scaled_from_columns,
    scaled_matrix_gradients,
    scaled_to_columns,
)
from mixlora_exp.kernels.triton.tiles import takes

__all__ = ["fused_block", "supports"]

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Side:
    """A projection's experts as operators take them, all None or 1 where it has none."""

    a: Tensor | None = None
    b: Tensor | None = None
    scale: Tensor | None = None
    norm: Tensor | None = None
    factor: float = 1.0


def _side(low: LowRank | None, norm: Tensor | None) -> _Side:
    if low is None:
        return _Side()
    scale = None if low.scale is None else low.scale.contiguous()
    norm = None if scale is None else norm
    return _Side(low.a.contiguous(), low.b.contiguous(), scale, norm, low.factor)


class _Sides:
    """The tensors of a block that both the forward and the backward pass need."""

    def __init__(self, block: FeedForward, dtype: torch.dtype) -> None:
        made = {
            role: _side(low, None if low is None else block.projections[role].experts.norm)
            for role, low in low_ranks(block, dtype).items()
        }
        self.gate, self.up, self.down = (made[role] for role in ROLES)
        self.per_slot = block.down.has_scale
        self.x_drop = _drop(block.x_mask if self.has_low_input else None)
        self.hidden_drop = _drop(block.hidden_mask if self.down.a is not None else None)

    @property
    def has_low_input(self) -> bool:
        """True if gate or up has experts."""
        return self.gate.a is not None or self.up.a is not None

    def operands(
        self, gate: Tensor, up: Tensor, p1: Tensor, p3: Tensor, way: SlotOrder, block: FeedForward
    ) -> Operands:
        return Operands(
            gate,
            up,
            p1 if self.gate.a is not None else None,
            p3 if self.up.a is not None else None,
            self.gate.b,
            self.up.b,
            self.down.a,
            self.gate.scale,
            self.up.scale,
            block.gate.bias,
            block.up.bias,
            self.hidden_drop[0],
            way.tokens,
            way.weights,
        )

    def settings(self, block: FeedForward) -> tuple:
        """Return the arguments of the operators of `hidden` that follow their tensors."""
        factors = self.gate.factor, self.up.factor
        return (*self.hidden_drop[1:], *factors, block.activation, self.per_slot)


def _drop(mask: HashMask | None) -> tuple[Tensor | None, int, int]:
    """Return (keys, place, threshold) of a mask."""
    return (None, 0, 0) if mask is None else (mask.elements, mask.place, mask.threshold)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, weights, experts, *tensors):
        with torch.autocast(x.device.type, enabled=False):
            block = _unpack(spec, tensors)
            sides = _Sides(block, x.dtype)
            way = order(experts, weights, block.num_experts)
            p1 = p3 = x.new_empty(0)
            if sides.has_low_input:
                keys, *place = sides.x_drop
                p1, p3 = to_columns(
                    x, sides.gate.a, sides.up.a, keys, way.tokens, way.experts, *place, 1.0, True
                )
            gate = block.gate.frozen.linear(x)
            up = block.up.frozen.linear(x)
            operands = sides.operands(gate, up, p1, p3, way, block)
            hidden, reduced = hidden_forward(operands, way.experts, *sides.settings(block))
            y, low, output = _project_down(hidden, reduced, way, sides, block)
        ctx.spec = spec
        ctx.save_for_backward(x, weights, gate, up, p1, p3, low, output, *way, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx.spec, dy.contiguous(), *ctx.saved_tensors)


def _project_down(
    hidden: Tensor, reduced: Tensor, way: SlotOrder, sides: _Sides, block: FeedForward
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (y (T, D), the experts' `A h` (T K, R), with DoRA the rows' outputs before its scale).

    hidden, reduced: as of `hidden_forward`.
    """
    y, down = block.down.frozen.linear(hidden), sides.down
    if down.b is None:
        return y, None, None
    if sides.per_slot:
        parts = (y, reduced, down.b, down.scale, way.tokens, way.experts, way.weights)
        y, output, low = scaled_from_columns(*parts, down.factor)
        return y, low, output
    where = way.tokens, way.experts, way.slots
    y, low, _, _ = from_columns(
        y, None, reduced, None, down.b, None, None, *where, None, 0, 0, down.factor, False
    )
    return y, low, None


@dataclass(frozen=True, slots=True)
class _DownGradients:
    """dhidden, q: as the kernels take them; dweights (T, K), with DoRA alone; of the experts: db,
    dmagnitude."""

    dhidden: Tensor
    q: Tensor | None = None
    dweights: Tensor | None = None
    db: Tensor | None = None
    dmagnitude: Tensor | None = None


def _down_backward(
    dy: Tensor,
    low: Tensor | None,
    output: Tensor | None,
    way: SlotOrder,
    sides: _Sides,
    block: FeedForward,
) -> _DownGradients:
    """Return the backward pass of `_project_down`."""
    down, frozen = sides.down, block.down.frozen
    if down.b is None:
        return _DownGradients(frozen.input_gradient(dy))
    dtype, at = block.down.experts.b.dtype, (way.tokens, way.weights, way.rows, way.starts)
    if not sides.per_slot:
        where = way.tokens, way.experts
        q, _ = to_columns(dy, down.b, None, None, *where, 0, 0, down.factor, False)
        db, _ = matrix_gradients(dy, low, None, None, *at, dtype, 0, 0, down.factor, False)
        return _DownGradients(frozen.input_gradient(dy), q, None, db)
    where = way.tokens, way.experts, way.weights, way.slots
    q, doutput, dweights = scaled_to_columns(dy, down.b, down.scale, output, *where, down.factor)
    db, dmagnitude = scaled_matrix_gradients(
        doutput, low, dy, output, down.norm, *at, dtype, down.factor
    )
    return _DownGradients(frozen.input_gradient(doutput), q, dweights, db, dmagnitude)


def _backward(spec, dy, x, weights, gate, up, p1, p3, low, output, *rest):
    """Return the gradients of `_Block.forward`'s arguments."""
    way, tensors = SlotOrder(*rest[: len(SlotOrder._fields)]), rest[len(SlotOrder._fields) :]
    block = _unpack(spec, tensors)
    sides = _Sides(block, x.dtype)
    operands = sides.operands(gate, up, p1, p3, way, block)
    settings = sides.settings(block)
    down = _down_backward(dy, low, output, way, sides, block)
    kinds = {p.experts.b.dtype for p in block.projections.values() if p.experts is not None}
    dtype = kinds.pop()
    norms = sides.gate.norm, sides.up.norm
    # Before `hidden_backward_tokens`, which may write over dhidden.
    db1, db3, da2, dmagnitude1, dmagnitude3 = hidden_backward_inner(
        operands, way.rows, way.starts, down.q, down.dhidden, *norms, dtype, *settings
    )
    # A large tensor less at the peak: a tile of `dhidden` is read where its gradient is written.
    dgate = torch.empty_like(gate) if sides.per_slot else down.dhidden
    dup, dp1, dp3, dweights = hidden_backward_tokens(
        operands, way.experts, down.q, down.dhidden, dgate, *settings
    )
    keys, *place = sides.x_drop
    dx, low1, low3, summed = from_columns(
        block.gate.frozen.input_gradient(dgate),
        block.up.frozen.input_gradient(dup),
        dp1 if sides.gate.a is not None else None,
        dp3 if sides.up.a is not None else None,
        sides.gate.a,
        sides.up.a,
        keys,
        way.tokens,
        way.experts,
        way.slots,
        None if sides.per_slot else dweights,
        *place,
        1.0,
        True,
    )
    da1 = da3 = None
    if sides.has_low_input:
        at = way.tokens, way.weights, way.rows, way.starts
        lows = (
            (low1 if sides.gate.a is not None else None),
            (low3 if sides.up.a is not None else None),
        )
        da1, da3 = matrix_gradients(x, *lows, keys, *at, dtype, *place, 1.0, True)
    dweights = summed if down.dweights is None else down.dweights
    found = {
        "gate": (da1, db1, dmagnitude1),
        "up": (da3, db3, dmagnitude3),
        "down": (da2, down.db, down.dmagnitude),
    }
    gradients = []
    for role, projection in block.projections.items():
        own = projection.experts
        if own is None:
            gradients += [None] * 5
            continue
        da, db, dmagnitude = found[role]
        if own.magnitude is None:
            dmagnitude = None
        gradients += [da, db, dmagnitude, None, None]
    none = [None] * (len(tensors) - len(gradients))
    return None, dx, dweights.to(weights.dtype), None, *gradients, *none


def _pack(block: FeedForward) -> tuple[tuple[Spec, bool], list[Tensor | None]]:
    """Return `pack`, and the experts' forms in the dtype of the products; whether both masks have
    the same keys, which then stand there once: a compiler refuses a tensor that stands twice."""
    spec, tensors = pack(block)
    shared = tensors[-1] is not None and tensors[-1] is tensors[-2]
    if shared:
        tensors[-1] = None
    for projection in block.projections.values():
        low = None if projection.experts is None else projection.experts.low
        tensors += (None,) * 3 if low is None else (low.a, low.b, low.scale)
    return (spec, shared), tensors


def _unpack(packed: tuple[Spec, bool], tensors: Sequence[Tensor | None]) -> FeedForward:
    """Return the block that `_pack` made these of."""
    (spec, shared), (*own, hidden_keys), lows = packed, tensors[:-9], tensors[-9:]
    block, made = unpack(spec, [*own, own[-1] if shared else hidden_keys]), {}
    for i, (role, projection) in enumerate(block.projections.items()):
        a, b, scale = lows[3 * i : 3 * i + 3]
        if a is not None:
            experts = replace(projection.experts, low=Low(a, b, scale))
            projection = replace(projection, experts=experts)
        made[role] = projection
    return replace(block, **made)


def supports(x: Tensor, routing: Routing, block: FeedForward) -> bool:
    """Return whether the Triton kernels compute this block for x (T, D).

    They take float32, float16 and bfloat16 on a GPU of compute capability 8.0 or above, in the
    interpreter float32 and float16 on a CPU; a known activation; dropout masks that are hashes;
    frozen weights, and biases in the dtype of x, that ask for no gradient; experts of one number,
    rank and dtype, with matrices of less than 2^31 elements; a rank and K that `tiles.takes`; and
    at least one token.
    """
    present = [p.experts for p in block.projections.values() if p.experts is not None]
    dtypes = {torch.float32, torch.float16}
    on_device = True
    if not INTERPRETED:
        dtypes.add(torch.bfloat16)
        on_device = x.is_cuda and (
            not torch.cuda.is_available() or torch.cuda.get_device_properties(x.device).major >= 8
        )
    return (
        on_device
        and x.dtype in dtypes
        and len(x) > 0
        and len(present) > 0
        and len({(*e.a.shape[:2], e.a.dtype, e.b.dtype) for e in present}) == 1
        and takes(present[0].a.shape[1], routing.experts.shape[1], x.dtype)
        and all(max(e.a.numel(), e.b.numel()) < 2**31 for e in present)
        and all(m is None or isinstance(m, HashMask) for m in (block.x_mask, block.hidden_mask))
        and isinstance(block.activation, str)
        and block.activation in NAMES
        and all(
            not projection.frozen.requires_grad
            and (projection.bias is None or projection.bias.dtype == x.dtype)
            for projection in block.projections.values()
        )
    )


@cache
def _warn_slower(rank: int, slots: int, dtype: torch.dtype) -> None:
    if not takes(rank, slots, dtype):
        LOG.warning(
            f"kernel=triton is not made for {slots} experts per token of rank {rank} in {dtype}: "
            "these blocks run as with kernel=exact, which gives the same results"
        )


def fused_block(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """Compute `y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)` by fused kernels. x: (T, D); returns (T, D).

    What they do not support, `exact`'s dense form computes.
    """
    if not supports(x, routing, block):
        rank = max(p.experts.a.shape[1] for p in block.projections.values() if p.experts)
        if not torch.compiler.is_compiling():
            _warn_slower(rank, routing.experts.shape[1], x.dtype)
        return run_stage(dense_stage, x, routing, block)
    spec, tensors = _pack(block)
    y = _Block.apply(spec, x.contiguous(), routing.weights, routing.experts, *tensors)
    return add_down_bias(y, routing.weights, block)
