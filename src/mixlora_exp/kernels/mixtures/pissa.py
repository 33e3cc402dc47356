"""PiSSA (Meng et al. 2024): LoRA that starts from the largest singular values of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixlora_exp.kernels.mixture_base import Mixture, Sizes, mixture, stacked_product

__all__ = ["Pissa", "svd_of", "with_start_copy"]


@mixture("pissa")
@dataclass(frozen=True, kw_only=True)
class Pissa(Mixture):
    """`s B A x - s B0 A0 x`: one expert, no router, and `s B0 A0 = U_R S_R V_R^T` of W = U S V^T.

    The original subtracts the initial product s B0 A0 from W; here W stays as it is, and the
    constant product is part of the adapter, which is the same algebra. Dropout acts on both terms.
    """

    router = None
    mergeable = True
    fixed: ClassVar[tuple[str, ...]] = ("A0", "B0")
    starts_from_weight = True

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A (1, R, in), B (1, out, R) and of A0 and B0, their values at the
        start.

        Raises:
            ValueError: the weight has fewer than R singular values.
        """
        least = min(sizes.inputs, sizes.outputs)
        if sizes.rank > least:
            raise ValueError(
                f"rank={sizes.rank}: a weight of {sizes.outputs} x {sizes.inputs} has {least} "
                "singular values: choose a smaller rank"
            )
        trained = super().shapes(sizes)
        return {**trained, "A0": trained["A"], "B0": trained["B"]}

    def initial(self, sizes: Sizes, weight: Tensor, scaling: float) -> dict[str, Tensor]:
        """Return A = sqrt(S_R / s) V_R^T and B = U_R sqrt(S_R / s), and copies of them as A0 and
        B0."""
        self.shapes(sizes)  # Refuses a rank that the weight does not have.
        u, values, v = svd_of(weight)
        roots = (values[: sizes.rank] / scaling).sqrt()
        a, b = roots.unsqueeze(1) * v[: sizes.rank], u[:, : sizes.rank] * roots
        return with_start_copy(a, b)

    def branch(
        self, x: Tensor, weights: Tensor | None, parts: Mapping[str, Tensor], scaling: float
    ) -> Tensor:
        """Compute `s B A x - s B0 A0 x` of rows x (T, in): (T, out)."""
        start = stacked_product(x, parts["A0"], parts["B0"], None)
        return super().branch(x, weights, parts, scaling) - scaling * start

    def delta(self, parts: Mapping[str, Tensor], scaling: float) -> Tensor:
        """Return `s (B A - B0 A0)` (out, in)."""
        return scaling * (parts["B"][0] @ parts["A"][0] - parts["B0"][0] @ parts["A0"][0])


def svd_of(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of a matrix (out, in), in float32 or better."""
    whole = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    return torch.linalg.svd(whole, full_matrices=False)


def with_start_copy(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return A (R, in) and B (out, R) as the one expert's weights, and once more as those at the
    start."""
    made = {"A": a.unsqueeze(0).contiguous(), "B": b.unsqueeze(0).contiguous()}
    return {**made, **{f"{name}0": start.clone() for name, start in made.items()}}
