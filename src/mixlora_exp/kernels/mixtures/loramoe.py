"""LoRAMoE (Dou et al. 2024): a soft mixture of all experts, and a loss that sorts them by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora_exp.kernels.mixture_base import Mixture, mixture
from mixlora_exp.kernels.router_base import Router
from mixlora_exp.kernels.shapes import Routing

__all__ = ["LoraMoe"]


@mixture("loramoe")
@dataclass(frozen=True, kw_only=True)
class LoraMoe(Mixture):
    """`s sum_e p_e B_e A_e x` with the softmax p over all E experts.

    The loss needs the type (0 or 1) of each sequence's task and is 0 without. With u[b, e], the sum
    of p_e over the real tokens of sequence b, it is `var(c u) / (mean(c u)^2 + 1e-10)`, variance
    (unbiased) and mean over all b and e together. c[b, e] is 1 + d for the first half of the
    experts in sequences of type 1 and for the second half in those of type 0, else 1 - d. Its
    minimum has u proportional to 1/c: the half with 1 + d gets *less* weight, (1 - d) / (1 + d) of
    what the other half gets. Padding, which the original counts, is left out.

    d: see above; 0: all experts alike, whatever the type.
    """

    router = "dense"
    typed_loss = True
    loss_options = ("d",)
    d: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.d < 1:
            raise ValueError(f"mixture_options.d={self.d} must be in [0, 1)")

    def statistics(
        self, router: Router, routing: Routing, mask: Tensor | None, types: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the router's statistics and `dispersion`, the layer's loss: a scalar, 0 without
        `types`."""
        found = router.statistics(routing, mask)
        shares = routing.probabilities
        if types is None:
            return {**found, "dispersion": shares.new_zeros(())}
        if mask is not None:
            shares = torch.where(mask.unsqueeze(1), shares, 0.0)
        used = shares.view(len(types), -1, shares.shape[1]).sum(dim=1)
        experts = torch.arange(shares.shape[1], device=shares.device)
        first = experts < shares.shape[1] / 2
        more = first == (types.to(shares.device) == 1).unsqueeze(1)
        # A `where` of two numbers would be in float32.
        weighted = torch.where(more, (1 + self.d) * used, (1 - self.d) * used)
        return {**found, "dispersion": weighted.var() / (weighted.mean() ** 2 + 1e-10)}

    def auxiliary_loss(self, router: Router, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the mean (or sum) of the layers' dispersions, plus the router's loss without its
        load-balance part."""
        each = statistics["dispersion"]
        loss = each.sum() if router.loss_reduction == "sum" else each.mean()
        # Instead of load balance, beside a z-loss.
        nothing = torch.zeros_like(statistics["fractions"])
        return loss + router.auxiliary_loss({**statistics, "fractions": nothing})
