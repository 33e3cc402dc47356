"""Common base of routers with a softmax over all experts: options, noise and z-loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixlora_exp.kernels.dropout import DropoutKey
from mixlora_exp.kernels.router_base import Router, router_fractions, router_logits
from mixlora_exp.kernels.shapes import Routing

__all__ = ["SoftmaxRouter", "real_counts", "varying_fractions"]


def varying_fractions(statistics: Mapping[str, Tensor], loss: str) -> dict[str, Tensor]:
    """Return `Router.statistics` where rows have different numbers of experts: F_e is e's share of
    all filled slots, so that E sum_e F_e P_e is 1 at balance whatever these numbers are. With
    loss=topk F_e stays the share of rows that have e, and at balance the loss is their mean number
    of experts."""
    if loss == "topk":
        return dict(statistics)
    counts = statistics["counts"]
    return {**statistics, "fractions": counts / counts.sum().clamp(min=1)}


def real_counts(
    statistics: Mapping[str, Tensor], routing: Routing, mask: Tensor | None
) -> dict[str, Tensor]:
    """Return `Router.statistics` that padding is part of, with the counts of real rows for
    reports."""
    return {**statistics, "counts": router_fractions(routing, mask, count_all=True)[2]}


@dataclass(frozen=True, kw_only=True)
class SoftmaxRouter(Router):
    """p = softmax(G x' / temperature) over all experts, of which `choose` takes some.

    temperature: above 1 it makes the experts more alike. jitter: in training x' = u x elementwise,
    u uniform in 1 +- jitter, which the router alone sees, not the experts; u depends on the seed,
    the optimizer step, the row's example and position and the module, as dropout does, and on no
    generator. Scoring has no noise, with evaluation.dropout=true neither. z_loss: coefficient of
    the mean over real rows of (log sum_e exp logit_e)^2 (ST-MoE), which is added to
    `router_loss_coef` times the router's loss. normalise: whether the weights of a row are divided
    by their sum.
    """

    temperature: float = 1.0
    jitter: float = 0.0
    z_loss: float = 0.0
    normalise: bool = True
    loss_coef: float = 1e-3

    def __post_init__(self) -> None:
        self.require(self.temperature > 0, "temperature", "must be > 0")
        self.require(0 <= self.jitter < 1, "jitter", "must be in [0, 1)")
        self.require(self.z_loss >= 0, "z_loss", "must be >= 0")
        self.require(
            self.z_loss == 0 or self.loss_coef > 0,
            "z_loss",
            "is part of the router's loss, which router_loss_coef=0 switches off: set it to 0 too",
        )

    def learns_with(self, slots: int) -> bool:
        """Return whether the task's loss has a gradient for the router's weights where rows have at
        most `slots` experts: one expert alone gives one unless its weight is normalised to 1."""
        return slots > 1 or (slots == 1 and not self.normalise)

    def require(self, holds: bool, option: str, rule: str) -> None:
        """Raise a ValueError that names the option, its value and the rule unless it holds."""
        if not holds:
            raise ValueError(f"router_options.{option}={getattr(self, option)} {rule}")

    @abstractmethod
    def choose(
        self,
        logits: Tensor,
        probabilities: Tensor,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Routing:
        """Return the decision, before its weights are normalised.

        logits, divided by the temperature, and probabilities: (T, E); x, with its noise, weights
        and mask: as of `route_masked`.
        """

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute G x, (T, E)."""
        return router_logits(x, weight)

    def route(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        *,
        training: bool = False,
        fused: bool = False,
    ) -> Routing:
        """Return `route_masked` with all rows real."""
        return self.route_masked(x, weights, None, training=training, fused=fused)

    def route_masked(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
        *,
        training: bool = False,
        fused: bool = False,
        key: DropoutKey | None = None,
    ) -> Routing:
        """Return the decision for rows x (T, in): softmax of the logits of x with its noise,
        `choose`, and weights that sum to 1 per row if `normalise`.

        Raises:
            ValueError: there is jitter, gradients are on, and `key` has no rows to draw it for.
        """
        if training and self.jitter:
            x = self._with_noise(x, key)
        if len(weights) > 1:
            # Several products read x in this type: they keep one copy of it.
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        logits = self.logits(x, weights[""])
        if self.temperature != 1:
            logits = logits / self.temperature
        routing = self.choose(logits, logits.softmax(dim=-1), x, weights, mask)
        if not self.normalise:
            return routing
        total = routing.weights.sum(dim=-1)
        total = total if routing.base is None else total + routing.base
        total = torch.where(total == 0, 1.0, total)
        base = None if routing.base is None else routing.base / total
        return replace(routing, weights=routing.weights / total.unsqueeze(-1), base=base)

    def _with_noise(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        uniform = None if key is None else key.uniform("router", x.shape[1])
        if uniform is None:
            if not torch.is_grad_enabled():
                return x
            raise ValueError(
                f"router_options.jitter={self.jitter} needs rows with names, so that noise is the "
                "same again after a pause: this project's trainer gives them, another calls "
                "use_dropout_stream and DropoutStream.begin; or set router_options.jitter=0"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) * (1 + self.jitter * (2 * uniform - 1))

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        """Return `Router.statistics` and, with a z-loss, `z`: the mean over real rows of (log sum_e
        exp logit_e)^2."""
        found = super().statistics(routing, mask)
        if self.z_loss:
            squares = routing.logits.logsumexp(dim=-1).square()
            found["z"] = self.mean_of_real(squares, mask)
        return found

    @staticmethod
    def mean_of_real(values: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean of values (T, ...) over the real rows; 0 where there are none."""
        if mask is None:
            return values.mean(dim=0)
        real = mask.view(-1, *[1] * (values.dim() - 1))
        return torch.where(real, values, 0.0).sum(dim=0) / mask.sum().clamp(min=1)

    def auxiliary_loss(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the load-balance loss, Eq. (8), plus z_loss / loss_coef times the z-loss: the sum
        is multiplied by `router_loss_coef` later."""
        loss = super().auxiliary_loss(statistics)
        if not self.z_loss:
            return loss
        z = statistics["z"]
        z = z.sum() if self.loss_reduction == "sum" else z.mean()
        # The whole is multiplied by `router_loss_coef` later.
        return loss + self.z_loss / self.loss_coef * z
