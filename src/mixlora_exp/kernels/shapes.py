"""What the kernels take: the frozen feed-forward block, its LoRA experts and the routing.

Shape letters, used throughout this package: `T` tokens, `D` hidden size, `F` feed-forward size,
`E` experts, `K` experts per token, `R` rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Experts", "FeedForward", "Projection", "Routing"]


@dataclass(frozen=True, slots=True)
class Experts:
    """The LoRA experts of one projection.

    `a`: (E, R, in), `b`: (E, out, R). With DoRA, `magnitude` (E, out) is trained and `norm`
    (E, out) is the row norm of `W + scaling B A`, a constant in the backward pass.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen weight (out, in) shared by all experts, and its experts if it has any."""

    weight: Tensor
    experts: Experts | None = None

    @property
    def has_scale(self) -> bool:
        """Whether each expert scales its whole output per row (DoRA)."""
        return self.experts is not None and self.experts.magnitude is not None


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A gated feed-forward block, `down(activation(gate(x)) * up(x))`: SwiGLU or GeGLU.

    `dropout` is the probability with which the input of each low-rank branch is dropped: one mask
    on x for the gate and up branches of all experts, and one mask per slot on the hidden state.
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Routing:
    """The router's decision.

    `logits` (T, E) and `probabilities` (T, E) over all experts; `experts` (T, K) the chosen ones,
    the most probable first; `weights` (T, K) their probabilities, normalised to sum 1.
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    weights: Tensor
