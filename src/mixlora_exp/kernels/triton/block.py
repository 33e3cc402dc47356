"""The exact kernel with the experts' part fused by Triton: the frozen products stay with torch.

Kept for the backward pass are x, W1 x, W3 x and small things of E R columns; DoRA on the down
projection also keeps its K outputs. Nothing is read back to the host and no shape depends on the
data, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mixlora_exp.kernels.activations import NAMES
from mixlora_exp.kernels.dropout import DropMask
from mixlora_exp.kernels.mixlora.dense import dense_stage
from mixlora_exp.kernels.mixlora.packing import pack, unpack
from mixlora_exp.kernels.mixlora.stage import add_down_bias, run_stage
from mixlora_exp.kernels.shapes import FeedForward, LowRank, Routing, low_ranks
from mixlora_exp.kernels.triton import launch
from mixlora_exp.kernels.triton.parts import INTERPRETED
from mixlora_exp.kernels.triton.tiles import max_columns

__all__ = ["mixlora_triton", "supports"]


@dataclass(frozen=True, slots=True)
class _Stacked:
    """A projection's experts side by side: a (E R, in), b (out, E R), scale (E, out) or None."""

    a: Tensor
    b: Tensor
    factor: float
    scale: Tensor | None


def _stack(low: LowRank) -> _Stacked:
    b = low.b.transpose(0, 1).flatten(1, 2).contiguous()
    return _Stacked(low.a.flatten(0, 1), b, low.factor, low.scale)


class _Prepared:
    """What both passes need, made anew in each from the parameters: it is cheap to make, and would
    be kept for every layer of a model.

    stacked: by role, without the roles that have no experts. a: (E R of gate, then of up, D), None
    without experts on both. filled: (T, K) bool; weights: (T, K) float32, the router's.
    """

    def __init__(self, block: FeedForward, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        lows = low_ranks(block, x.dtype)
        self.stacked = {role: _stack(low) for role, low in lows.items() if low is not None}
        sides = [self.stacked[role].a for role in ("gate", "up") if role in self.stacked]
        self.a = torch.cat(sides) if sides else None
        self.x_low = x if block.x_mask is None else block.x_mask.zero(x)
        self.num_experts = block.num_experts
        self.filled = weights != 0
        self.weights = weights.float().contiguous()

    def operands(
        self, gate: Tensor, up: Tensor, p: Tensor | None, experts: Tensor, block: FeedForward
    ) -> launch.Operands:
        sides = [self.stacked.get(role) for role in ("gate", "up")]
        a2 = None
        if "down" in self.stacked:
            a2 = self.stacked["down"].a.T.contiguous()
        mask = block.hidden_mask if a2 is not None else None
        any_side = next(iter(self.stacked.values()))
        return launch.Operands(
            gate,
            up,
            p,
            *(None if side is None else side.b for side in sides),
            a2,
            *(None if side is None else side.scale for side in sides),
            block.gate.bias,
            block.up.bias,
            experts,
            self.weights,
            None if mask is None else mask.elements.view(torch.uint8),
            *(0.0 if side is None else side.factor for side in sides),
            self.num_experts,
            any_side.b.shape[1] // self.num_experts,
            block.activation,
            block.down.has_scale,
        )

    def own_columns(self, columns: Tensor, experts: Tensor) -> Tensor:
        """(T, K, E R): of the columns, (T, K, E R) or (T, 1, E R), those of each slot's expert."""
        chosen = functional.one_hot(experts, self.num_experts).bool() & self.filled.unsqueeze(-1)
        grouped = columns.unflatten(-1, (self.num_experts, -1))
        return torch.where(chosen.unsqueeze(-1), grouped, 0.0).flatten(2)

    def down_scale(self, experts: Tensor) -> Tensor:
        """(T, K, D): DoRA's scale of each slot's expert, 0 of an empty slot."""
        scale = functional.embedding(experts, self.stacked["down"].scale)
        return torch.where(self.filled.unsqueeze(-1), scale, 0.0)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, weights, experts, *tensors):
        with torch.autocast(x.device.type, enabled=False):
            block = unpack(spec, tensors)
            made = _Prepared(block, x, experts, weights)
            gate = block.gate.frozen.linear(x)
            up = block.up.frozen.linear(x)
            p = None if made.a is None else functional.linear(made.x_low, made.a)
            operands = made.operands(gate, up, p, experts, block)
            hidden, reduced = launch.forward(operands)
            reduced = None if reduced is None else reduced.to(x.dtype)
            y, raw = _project_down(hidden, reduced, experts, made, block)
        ctx.spec = spec
        ctx.save_for_backward(x, weights, experts, gate, up, p, reduced, raw, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx.spec, dy.contiguous(), *ctx.saved_tensors)


def _project_down(
    hidden: Tensor, reduced: Tensor | None, experts: Tensor, made: _Prepared, block: FeedForward
) -> tuple[Tensor, Tensor | None]:
    """(y (T, D), with DoRA the outputs of the slots before its scale (T, K, D)).

    hidden, reduced: as `launch.forward` returns them.
    """
    if reduced is None:
        return block.down.frozen.linear(hidden), None
    down = made.stacked["down"]
    if down.scale is None:
        y = block.down.frozen.linear(hidden)
        return y.addmm_(reduced, down.b.T, alpha=down.factor), None
    raw = block.down.frozen.linear(hidden)
    own = made.own_columns(reduced.unsqueeze(1), experts)
    raw.flatten(0, 1).addmm_(own.flatten(0, 1), down.b.T, alpha=down.factor)
    scaled = raw * made.down_scale(experts)
    return (made.weights.to(raw.dtype).unsqueeze(-1) * scaled).sum(dim=1), raw


@dataclass(frozen=True, slots=True)
class _DownGradients:
    """dhidden, q: as the kernels take them; dweights (T, K) None where the kernel makes it; of the
    experts: db (D, E R) and dscale (D, E)."""

    dhidden: Tensor
    q: Tensor | None
    dweights: Tensor | None
    db: Tensor | None
    dscale: Tensor | None


def _down_backward(
    dy: Tensor,
    experts: Tensor,
    reduced: Tensor | None,
    raw: Tensor | None,
    made: _Prepared,
    block: FeedForward,
) -> _DownGradients:
    """The backward pass of `_project_down`."""
    down, frozen = made.stacked.get("down"), block.down.frozen
    if down is None:
        return _DownGradients(frozen.input_gradient(dy), None, None, None, None)
    if down.scale is None:
        q = (dy @ down.b).mul_(down.factor)
        db = (dy.T @ reduced).mul_(down.factor)
        return _DownGradients(frozen.input_gradient(dy), q, None, db, None)
    weighted = made.weights.to(dy.dtype).unsqueeze(-1) * dy.unsqueeze(1)
    scale = made.down_scale(experts)
    dweights = (dy.unsqueeze(1) * scale * raw).sum(dim=-1, dtype=torch.float32)
    chosen = functional.one_hot(experts.flatten(), made.num_experts).to(dy.dtype)
    dscale = (weighted * raw).flatten(0, 1).T @ chosen
    draw = weighted.mul_(scale)
    q = made.own_columns(draw @ down.b, experts).sum(dim=1).mul_(down.factor)
    own = made.own_columns(reduced.unsqueeze(1), experts)
    db = (draw.flatten(0, 1).T @ own.flatten(0, 1)).mul_(down.factor)
    return _DownGradients(frozen.input_gradient(draw), q, dweights, db, dscale)


def _backward(spec, dy, x, weights, experts, gate, up, p, reduced, raw, *tensors):
    """The gradients of `_Block.forward`'s arguments."""
    block = unpack(spec, tensors)
    made = _Prepared(block, x, experts, weights)
    operands = made.operands(gate, up, p, experts, block)
    down = _down_backward(dy, experts, reduced, raw, made, block)
    # Before `backward_tokens`, which writes over dhidden.
    sums = launch.backward_inner(operands, down.dhidden, down.q)
    dgate, dup, dp, dweights = launch.backward_tokens(operands, down.dhidden, down.q)
    dweights = down.dweights if dweights is None else dweights
    dx = block.gate.frozen.input_gradient(dgate)
    dx += block.up.frozen.input_gradient(dup)
    das = {}
    if dp is not None:
        dp = dp.to(x.dtype)
        if block.x_mask is None:
            dx.addmm_(dp, made.a)
        else:
            dx += block.x_mask.zero(dp @ made.a)
        parts = (dp.T @ made.x_low).unflatten(0, (operands.sides, made.num_experts, -1))
        das = dict(
            zip([role for role in ("gate", "up") if role in made.stacked], parts, strict=True)
        )
    dbs = {"gate": sums["b1"], "up": sums["b3"], "down": down.db}
    dscales = {"gate": sums["scale1"], "up": sums["scale3"], "down": down.dscale}
    if sums["a2"] is not None:
        das["down"] = sums["a2"].T.unflatten(0, (made.num_experts, -1))
    found = []
    for role, projection in block.projections.items():
        own = projection.experts
        if own is None:
            found += [None] * 5
            continue
        db = dbs[role].unflatten(1, (made.num_experts, -1)).transpose(0, 1).to(own.b.dtype)
        dmagnitude = None
        if own.magnitude is not None:
            dmagnitude = (dscales[role].T / own.norm).to(own.magnitude.dtype)
        found += [das[role].to(own.a.dtype), db, dmagnitude, None, None]
    return None, dx, dweights.to(weights.dtype), None, *found, None, None


def supports(x: Tensor, block: FeedForward) -> bool:
    """Whether the Triton kernels compute this block for x (T, D).

    They take float32, float16 and bfloat16 on a GPU of compute capability 8.0 or above, in the
    interpreter float32 and float16 on a CPU; a known activation; frozen weights, and biases in the
    dtype of x, that ask for no gradient; experts of one number and rank, up to `max_columns`
    columns of all together; and at least one token.
    """
    present = [p.experts for p in block.projections.values() if p.experts is not None]
    dtypes = {torch.float32, torch.float16}
    if INTERPRETED:
        on_device = True
    else:
        dtypes.add(torch.bfloat16)
        on_device = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return (
        on_device
        and x.dtype in dtypes
        and len(x) > 0
        and bool(present)
        and len({experts.a.shape[:2] for experts in present}) == 1
        and triton.next_power_of_2(present[0].a.shape[:2].numel()) <= max_columns(x.dtype)
        and isinstance(block.activation, str)
        and block.activation in NAMES
        and all(
            not projection.frozen.requires_grad
            and (projection.bias is None or projection.bias.dtype == x.dtype)
            for projection in block.projections.values()
        )
    )


def _as_kept(mask: DropMask | None) -> DropMask | None:
    """The mask as (rows, width) bool, which both passes read."""
    if mask is None:
        return None
    return DropMask(mask.kept().contiguous(), mask.scale, mask.shape)


def mixlora_triton(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """`y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)` by fused kernels. x: (T, D); returns (T, D).

    What they do not support, `exact`'s dense form computes; so it does under `torch.compile`, where
    the compiler fuses by itself.
    """
    if torch.compiler.is_compiling() or not supports(x, block):
        return run_stage(dense_stage, x, routing, block)
    block = replace(block, x_mask=_as_kept(block.x_mask), hidden_mask=_as_kept(block.hidden_mask))
    spec, tensors = pack(block)
    y = _Block.apply(spec, x.contiguous(), routing.weights, routing.experts.contiguous(), *tensors)
    return add_down_bias(y, routing.weights, block)
