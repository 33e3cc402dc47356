"""LoRA-GA (Wang et al. 2024): LoRA that starts along the gradient of full fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mixlora_exp.kernels.mixture_base import Mixture, Sizes, mixture
from mixlora_exp.kernels.mixtures.pissa import Pissa, svd_of, with_start_copy

__all__ = ["LoraGa"]


@mixture("lora_ga")
@dataclass(frozen=True, kw_only=True)
class LoraGa(Pissa):
    """`s B A x - s B0 A0 x` like PiSSA, with A0 and B0 from the gradient G = U S V^T of the loss by
    the weight: A0 = V_1..R^T and B0 = U_R+1..2R S_R+1..2R out^(1/4) / sqrt(gamma).

    This is what PEFT 0.21 computes for `direction="ArB2r"` and `scale="stable"`; there the loss is
    a callback's, here that of the first optimizer step's batches (`training/hooks/lora_ga.py`).
    Until then the layer starts like LoRA.
    """

    starts_from_weight = False
    starts_from_gradient = True
    gamma: float = 16.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"mixture_options.gamma={self.gamma} must be > 0 and finite")

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `Pissa.shapes`.

        Raises:
            ValueError: the weight has fewer than 2 R singular values.
        """
        least = min(sizes.inputs, sizes.outputs)
        if 2 * sizes.rank > least:
            raise ValueError(
                f"rank={sizes.rank}: LoRA-GA takes twice as many singular values, and a weight of "
                f"{sizes.outputs} x {sizes.inputs} has {least}: choose a smaller rank"
            )
        return super().shapes(sizes)

    def initial(self, sizes: Sizes, weight: Tensor, scaling: float) -> dict[str, Tensor]:
        """Return LoRA's weights, A uniform and B zero, and copies of them as A0 and B0;
        `from_gradient` replaces them."""
        made = Mixture.initial(self, sizes, weight, scaling)
        return with_start_copy(made["A"][0], made["B"][0])

    def from_gradient(self, gradient: Tensor, rank: int) -> dict[str, Tensor]:
        """Return A, B, A0 and B0 of a layer, given the gradient (out, in) of the loss by its
        weight."""
        u, values, v = svd_of(gradient)
        scale = gradient.shape[0] ** 0.25 / math.sqrt(self.gamma)
        own = slice(rank, 2 * rank)
        return with_start_copy(v[:rank], u[:, own] * values[own] * scale)
