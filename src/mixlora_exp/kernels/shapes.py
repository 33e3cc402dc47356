"""Arguments of the kernels: the frozen feed-forward block, its LoRA experts and the routing.

Shape letters, used throughout this package: `T` tokens, `D` hidden size, `F` feed-forward size,
`E` experts, `K` experts per token, `R` rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_exp.kernels.activations import Activation
from mixlora_exp.kernels.dropout import DropMask, DropoutKey
from mixlora_exp.kernels.frozen import Frozen

__all__ = [
    "ROLES",
    "Experts",
    "FeedForward",
    "Gradients",
    "Low",
    "LowRank",
    "Projection",
    "Routing",
    "low_ranks",
    "scale_of",
    "stacked",
]

ROLES = ("gate", "up", "down")
"""The projections of a feed-forward block."""


@dataclass(frozen=True, slots=True)
class Low:
    """Adapter weights in the dtype of the products, copies of the parameters without a gradient.

    a, b: (E, R, in) and (E, out, R), of a linear layer (R, in) and (out, R); scale: DoRA's
    magnitude / norm (E, out) or (out,), None for LoRA.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """The LoRA experts of one projection.

    `a`: (E, R, in), `b`: (E, out, R). With DoRA, `magnitude` (E, out) is trained and `norm`
    (E, out) is the row norm of `W + scaling B A`, a constant in the backward pass. These get the
    gradients; `low` may hold them in the dtype of the products.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    low: Low | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen projection shared by all experts, and its experts, if it has any:

        scale_e (W x + s B_e A_e drop(x)) + bias

    DoRA's scale leaves the bias alone.
    """

    frozen: Frozen
    experts: Experts | None = None

    @property
    def bias(self) -> Tensor | None:
        """The frozen projection's bias (out,), or None."""
        return self.frozen.bias

    @property
    def has_scale(self) -> bool:
        """True if each expert scales its whole output per row (DoRA)."""
        return self.experts is not None and self.experts.magnitude is not None


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A gated feed-forward block, `down(activation(gate(x)) * up(x))`: SwiGLU or GeGLU.

    `dropout` is the probability with which an element of a low-rank branch's input is dropped. One
    mask on x (T, D) serves the gate and up branches of all experts, one on the hidden state (T, F)
    serves all slots of a token; None where there is no dropout. (`peft` draws its own masks, from
    `dropout_key` or else torch's default generator.)
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: Activation
    dropout: float = 0.0
    x_mask: DropMask | None = None
    hidden_mask: DropMask | None = None
    dropout_key: DropoutKey | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return next(p.experts.a.shape[0] for p in self.projections.values() if p.experts)

    @property
    def projections(self) -> dict[str, Projection]:
        """The three projections by role."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def slice(self, first: int, end: int) -> FeedForward:
        """Return the block for tokens `first` to `end` alone: its masks are cut."""
        if self.x_mask is None and self.hidden_mask is None:
            return self
        masks = [
            None if m is None else m.slice(first, end) for m in (self.x_mask, self.hidden_mask)
        ]
        return replace(self, x_mask=masks[0], hidden_mask=masks[1])


@dataclass(frozen=True, slots=True)
class LowRank:
    """A projection's experts as products take them. a: (E, R, in), b: (E, out, R), in the dtype of
    the products; `factor` is the LoRA scaling times what dropout multiplies kept elements by;
    `scale` (E, out) is DoRA's `m / ||W + s B A||`."""

    a: Tensor
    b: Tensor
    factor: float
    scale: Tensor | None


class _InPlaceOf(torch.autograd.Function):
    """`low`, which was made of a parameter by a cast, or by division through `norm` and a cast;
    differentiable as if it were made here."""

    @staticmethod
    def forward(ctx, parameter, low, norm):
        ctx.dtype = parameter.dtype
        ctx.save_for_backward(norm)
        return low.view_as(low)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (norm,) = ctx.saved_tensors
        gradient = gradient.to(ctx.dtype)
        return gradient if norm is None else gradient / norm, None, None


def _low(parameter: Tensor, low: Tensor, norm: Tensor | None = None) -> Tensor:
    """Return `low`, with a gradient where one is wanted."""
    if torch.is_grad_enabled() and parameter.requires_grad:
        return _InPlaceOf.apply(parameter, low, norm)
    return low


def _held(experts: Experts, dtype: torch.dtype) -> Low | None:
    low = experts.low
    return low if low is not None and low.a.dtype == dtype else None


def scale_of(experts: Experts, dtype: torch.dtype) -> Tensor | None:
    """Return DoRA's `m / ||W + s B A||` (E, out) in `dtype`, differentiable in the magnitude; None
    for LoRA."""
    if experts.magnitude is None:
        return None
    assert experts.norm is not None
    held = _held(experts, dtype)
    if held is None:
        return (experts.magnitude / experts.norm).to(dtype)
    return _low(experts.magnitude, held.scale, experts.norm)


def low_ranks(block: FeedForward, dtype: torch.dtype) -> dict[str, LowRank | None]:
    """Return each projection's `LowRank` in `dtype` by role, None for one without experts;
    differentiable in the parameters."""
    made: dict[str, LowRank | None] = {}
    for role, projection in block.projections.items():
        experts = projection.experts
        if experts is None:
            made[role] = None
            continue
        held = _held(experts, dtype)
        if held is None:
            a, b = experts.a.to(dtype), experts.b.to(dtype)
        else:
            a, b = _low(experts.a, held.a), _low(experts.b, held.b)
        mask = block.hidden_mask if role == "down" else block.x_mask
        factor = experts.scaling * (1.0 if mask is None else mask.scale)
        made[role] = LowRank(a, b, factor, scale_of(experts, dtype))
    return made


class Gradients:
    """Sums of the adapters' gradients by role, in float32 or better.

    Of the magnitudes it holds the gradient times the norm; `flat` divides by it.
    """

    def __init__(self, block: FeedForward, dtype: torch.dtype) -> None:
        self.dtype = dtype = torch.promote_types(dtype, torch.float32)
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.magnitude: dict[str, Tensor] = {}
        for role, projection in block.projections.items():
            experts = projection.experts
            if experts is None:
                continue
            self.a[role] = torch.zeros_like(experts.a, dtype=dtype)
            self.b[role] = torch.zeros_like(experts.b, dtype=dtype)
            if experts.magnitude is not None:
                self.magnitude[role] = torch.zeros_like(experts.magnitude, dtype=dtype)

    def flat(self, block: FeedForward) -> list[Tensor | None]:
        """Return the gradients in the order of `packing.pack` and the dtypes of the parameters;
        None for tensors without one: norms, biases and masks."""
        found: list[Tensor | None] = []
        for role, projection in block.projections.items():
            experts = projection.experts
            if experts is None:
                found += [None] * 5
                continue
            magnitude = None
            if experts.magnitude is not None:
                magnitude = (self.magnitude[role] / experts.norm).to(experts.magnitude.dtype)
            a, b = self.a[role].to(experts.a.dtype), self.b[role].to(experts.b.dtype)
            found += [a, b, magnitude, None, None]
        return [*found, None, None]


@dataclass(frozen=True, slots=True)
class Routing:
    """A router's decision for T rows, 1 <= K <= E.

    `logits` (T, E) and `probabilities` (T, E) over all experts; `experts` (T, K) int64, the chosen
    ones, the most probable first, all different; `weights` (T, K) what their outputs are multiplied
    by. The weights need not sum to 1.

    A row may have fewer than K experts: a slot of weight 0 is empty. No kernel reads anything for
    it, its weight has no gradient, and its number in `experts` is any of 0 to E - 1.

    `base` (T,): what the frozen block without experts is multiplied by, to be added to the experts'
    sum; None: it is not. With `skips` it multiplies the block's input in place of the frozen block.
    Kernels do not read the two, `with_base` does.

    `extra`: what else, by name, the router's loss is made from. `rows`: the rows (T, in) as a fused
    router hands them on; where a block takes these, the router adds to their gradient in place of
    autograd.
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    weights: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    base: Tensor | None = None
    skips: bool = False

    @property
    def filled(self) -> Tensor:
        """Which slots hold an expert: (T, K) bool."""
        return self.weights.detach() != 0

    def slots_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return (tokens, slots) that an expert has, each int64 (n,)."""
        return ((self.experts == expert) & self.filled).nonzero(as_tuple=True)

    def by_expert(self, experts: int) -> list[tuple[int, Tensor, Tensor]]:
        """Return (expert, tokens, slots) for each of `experts` that has a slot; for all of them
        where none has one, since products of no rows keep the graph."""
        found = [(expert, *self.slots_of(expert)) for expert in range(experts)]
        return [one for one in found if len(one[1])] or found

    def at(self, rows: Tensor) -> Routing:
        """Return the decision for some rows alone, by number; without what the router's loss is
        made of beside it."""
        parts = (self.logits, self.probabilities, self.experts, self.weights)
        base = None if self.base is None else self.base[rows]
        return Routing(*(part[rows] for part in parts), base=base, skips=self.skips)

    def detached(self) -> Routing:
        """Return a copy of the decision without gradients."""
        parts = (self.logits, self.probabilities, self.experts, self.weights)
        extra = {name: value.detach() for name, value in self.extra.items()}
        base = None if self.base is None else self.base.detach()
        return Routing(*(part.detach() for part in parts), extra, base=base, skips=self.skips)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack N tensors of one shape as (N, ...); a single one as a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
