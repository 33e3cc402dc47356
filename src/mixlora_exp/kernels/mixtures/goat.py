"""GOAT (Fan et al. 2025): experts that start from segments of the weight's singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixlora_exp.kernels.mixture_base import Mixture, Sizes, mixture, stacked_product

__all__ = ["Goat"]


@mixture("goat")
@dataclass(frozen=True, kw_only=True)
class Goat(Mixture):
    """`s sum_{e in top-K} w_e B_e A_e x - c s sum_e B0_e A0_e x`, s = sqrt(3 eta in / R).

    The singular values of W = U S V^T are cut into E equal runs; expert e starts from the first R
    of run e with `s B_e A_e = U_e S_e V_e^T / rho`. The original subtracts the initial product from
    W; here W stays as it is and the constant product of A0 and B0, the weights at the start, is
    part of the adapter. Dropout acts on both terms alike. alpha is used with `usual_scale` alone.

    eta: learning rate of full fine-tuning over that of the adapter, as the paper's theory has it.
    rho: what the initial product is divided by. c: None for 1 / E, which makes the layer equal W
    at the start on average over balanced routing, not for each token. usual_scale: 1 for
    s = alpha / R, as one of the original's two versions has it.
    """

    fixed: ClassVar[tuple[str, ...]] = ("A0", "B0")
    own_scale = True
    starts_from_weight = True
    eta: float = 1.0
    rho: float = 10.0
    c: float | None = None
    usual_scale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("eta", "rho"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"mixture_options.{name}={value} must be > 0 and finite")
        if self.usual_scale not in (0, 1):
            raise ValueError(f"mixture_options.usual_scale={self.usual_scale} must be 0 or 1")
        if self.usual_scale and self.eta != 1:
            raise ValueError(
                f"mixture_options.eta={self.eta}: usual_scale=1 does not read it: leave it out"
            )
        if self.c is not None and not math.isfinite(self.c):
            raise ValueError(f"mixture_options.c={self.c} must be finite")

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A (E, R, in), B (E, out, R) and of A0 and B0, their values at the
        start.

        Raises:
            ValueError: the weight has fewer than E R singular values.
        """
        self._run(sizes)
        trained = super().shapes(sizes)
        return {**trained, "A0": trained["A"], "B0": trained["B"]}

    @staticmethod
    def _run(sizes: Sizes) -> int:
        """Return the number of singular values from which an expert chooses."""
        run = min(sizes.inputs, sizes.outputs) // sizes.experts
        if sizes.rank > run:
            raise ValueError(
                f"rank={sizes.rank}: each of {sizes.experts} experts starts from as many of its "
                f"{run} singular values of a weight of {sizes.outputs} x {sizes.inputs}: choose a "
                "smaller rank or fewer experts"
            )
        return run

    def scaling(self, sizes: Sizes, usual: float) -> float:
        """Return sqrt(3 eta in / R), or `usual` if that is asked for."""
        if self.usual_scale:
            return usual
        return math.sqrt(3 * self.eta * sizes.inputs / sizes.rank)

    def initial(self, sizes: Sizes, weight: Tensor, scaling: float) -> dict[str, Tensor]:
        """Return A and B from the singular values of W, and copies of them as A0 and B0."""
        run = self._run(sizes)
        whole = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        u, values, v = torch.linalg.svd(whole, full_matrices=False)
        starts = torch.arange(sizes.experts, device=whole.device) * run
        taken = (starts.unsqueeze(1) + torch.arange(sizes.rank, device=whole.device)).flatten()
        roots = (values[taken] / (scaling * self.rho)).sqrt()
        a = (roots.unsqueeze(1) * v[taken]).unflatten(0, (sizes.experts, sizes.rank))
        b = (u[:, taken] * roots).unflatten(1, (sizes.experts, sizes.rank)).permute(1, 0, 2)
        made = {"A": a, "B": b.contiguous()}
        return {**made, **{f"{name}0": start.clone() for name, start in made.items()}}

    def branch(
        self, x: Tensor, weights: Tensor | None, parts: Mapping[str, Tensor], scaling: float
    ) -> Tensor:
        """Compute `s sum_e w_e B_e A_e x - c s sum_e B0_e A0_e x` of rows x (T, in): (T, out)."""
        c = 1 / len(parts["A"]) if self.c is None else self.c
        start = stacked_product(x, parts["A0"], parts["B0"], None)
        return super().branch(x, weights, parts, scaling) - c * scaling * start
