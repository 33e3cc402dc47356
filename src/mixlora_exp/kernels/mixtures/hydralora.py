"""HydraLoRA (Tian et al. 2024): one A, several B, and a soft mixture of these."""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_exp.kernels.mixture_base import Mixture, Sizes, mixture

__all__ = ["HydraLora"]


@mixture("hydralora")
@dataclass(frozen=True, kw_only=True)
class HydraLora(Mixture):
    """`s sum_e p_e B_e A x` with the softmax p over all E experts.

    A x is computed once, with one dropout mask; the original computes it anew for each expert with
    a mask of its own.
    """

    router = "dense"

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the shared A (1, R, in) and of B (E, out, R)."""
        return {**super().shapes(sizes), "A": (1, sizes.rank, sizes.inputs)}
