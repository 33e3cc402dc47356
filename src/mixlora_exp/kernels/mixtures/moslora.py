"""MoSLoRA (Wu et al. 2024): LoRA with a trained matrix between A and B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.mixture_base import Mixture, Sizes, mixture, uniform

__all__ = ["MosLora"]


@mixture("moslora")
@dataclass(frozen=True, kw_only=True)
class MosLora(Mixture):
    """`s B M A x` with a mixer M (R, R), drawn uniformly in +-1/sqrt(R): one expert, no router."""

    router = None
    mergeable = True
    roles: ClassVar[Mapping[str, str]] = {"A": "A", "mixer": "A", "B": "B"}

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A (1, R, in), B (1, out, R) and `mixer` (R, R)."""
        return {**super().shapes(sizes), "mixer": (sizes.rank, sizes.rank)}

    def saved_numbers(self, sizes: Sizes) -> int:
        """Return the numbers a row keeps for the backward pass: LoRA's, and the R of M A x."""
        return super().saved_numbers(sizes) + sizes.rank

    def initial(self, sizes: Sizes, weight: Tensor, scaling: float) -> dict[str, Tensor]:
        """Return A as in LoRA, B zero, and a mixer uniform in +-1/sqrt(R)."""
        mixer = uniform(self.shapes(sizes)["mixer"], sizes.rank)
        return {**super().initial(sizes, weight, scaling), "mixer": mixer}

    def branch(
        self, x: Tensor, weights: Tensor | None, parts: Mapping[str, Tensor], scaling: float
    ) -> Tensor:
        """Compute `s B M A x` of rows x (T, in): (T, out)."""
        mixed = functional.linear(functional.linear(x, parts["A"][0]), parts["mixer"])
        return scaling * functional.linear(mixed, parts["B"][0])

    def delta(self, parts: Mapping[str, Tensor], scaling: float) -> Tensor:
        """Return `s B M A` (out, in)."""
        return scaling * parts["B"][0] @ parts["mixer"] @ parts["A"][0]
