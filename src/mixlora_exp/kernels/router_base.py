"""Base class of routers: weights, decision and loss in one class that registers itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.dropout import DropoutKey
from mixlora_exp.kernels.shapes import Routing

__all__ = [
    "ROUTERS",
    "Router",
    "is_expert",
    "make_router",
    "normalised",
    "ranked",
    "router",
    "router_fractions",
    "router_logits",
    "router_loss",
]


@dataclass(frozen=True, kw_only=True)
class Router(ABC):
    """Decides which experts each row gets, and has the loss that goes with its way of deciding.

    One serves a feed-forward block or a single linear layer alike: it sees the rows x (T, in) of
    the module that asks, and the weights that this module holds for it. Its fields are its
    settings, by name those of the adapter with or without `router_` before them; what the adapter
    has no setting for is taken from `router_options`.

    num_experts: E. top_k: K, at most how many experts a row gets where the router does not choose
    their number itself. init_std: of the initial weights. loss: what F_i of Eq. (9) counts,
    `argmax` or `topk`. loss_pooling: `layer` or `all`. loss_reduction: of the modules' losses,
    `mean` or `sum`.
    """

    frozen: ClassVar[bool] = False
    """True if the weights keep their initial values."""
    chooses: ClassVar[bool] = True
    """False if every row gives all experts the same weight."""
    roles: ClassVar[Mapping[str, str]] = {"": "A"}
    """Which of LoRA+'s two learning rates the weights have, by their names: that of A or of B."""
    single: ClassVar[bool] = False
    """True if a row gets one expert at most, whatever `top_k` is."""
    reads_top_k: ClassVar[bool] = True
    """False if `slots` does not depend on `top_k`."""
    varies: ClassVar[bool] = False
    """True if how many experts a row gets, `slots` at most, depends on the row."""
    block_options: ClassVar[tuple[str, ...]] = ()
    """Options that act on a feed-forward block alone, not on a single linear layer."""

    num_experts: int
    top_k: int
    init_std: float = 0.02
    loss: str = "argmax"
    loss_pooling: str = "layer"
    loss_reduction: str = "mean"

    @property
    def slots(self) -> int:
        """Largest number of experts that a row can get, K."""
        return self.top_k

    @property
    def base_share(self) -> float:
        """Largest share of rows that get no expert from a feed-forward block, 0 to 1."""
        return 0.0

    @property
    def skips(self) -> bool:
        """True if such a row is passed on as it is, not computed by the block without experts."""
        return False

    @property
    def trained(self) -> bool:
        """True if the weights are trained: with one expert they have nothing to decide, and no
        gradient."""
        return not self.frozen and self.num_experts > 1

    def learns_with(self, slots: int) -> bool:
        """Return whether the task's loss has a gradient for its weights where rows have at most so
        many experts. One normalised weight is always 1: a router with one expert per row learns
        from its own loss alone."""
        return slots > 1

    @property
    def by_sequence(self) -> bool:
        """True if `route_masked` needs to know where each sequence of the batch ends."""
        return False

    def initial(self, width: int) -> dict[str, Tensor]:
        """Return new weights by name, drawn from torch's default generator, for rows of `width`
        elements. The one called "" is stored as `lora_router`, others as `lora_router_NAME`."""
        return {"": torch.randn(self.num_experts, width) * self.init_std}

    @abstractmethod
    def route(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        *,
        training: bool = False,
        fused: bool = False,
    ) -> Routing:
        """Return the decision for rows x (T, in).

        weights: as of `initial`. training: whether noise that belongs to training is on. fused:
        whether kernels of a GPU may be used for it. Runs in float32 or better, since near ties
        decide which expert a row gets.
        """

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
        """Return `route`'s decision, given which rows are real, as `statistics` is later: for a
        router that counts on the way.

        mask: (T,) bool, None for all; (sequences, tokens) for one that is `by_sequence`. key: of
        the module that asks, for noise.
        """
        return self.route(x, weights, training=training, fused=fused)

    def statistics(self, routing: Routing, mask: Tensor | None) -> dict[str, Tensor]:
        """Return what the loss needs of one module's decision, with its graph; padding left out.

        mask: (T,), true for real rows, or None, as `route_masked` had it. `counts` (E,), the rows
        sent to each expert, must be among them, or come of them in `gathered`; means over rows and
        not sums, so that modules count alike.
        """
        fractions, probabilities, counts = router_fractions(
            routing, mask, count_all=self.loss == "topk"
        )
        return {"fractions": fractions, "probabilities": probabilities, "counts": counts}

    def gathered(self, each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack the statistics of all modules: each (modules, ...)."""
        device = next(iter(each[0].values())).device
        return {name: torch.stack([one[name].to(device) for one in each]) for name in each[0]}

    def auxiliary_loss(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss without its coefficient, a scalar: here the load-balance loss, Eq. (8).
        statistics: as of `gathered`."""
        fractions, probabilities = statistics["fractions"], statistics["probabilities"]
        loss = router_loss(fractions, probabilities, pooled=self.loss_pooling == "all")
        return loss * len(fractions) if self.loss_reduction == "sum" else loss


ROUTERS: dict[str, type[Router]] = {}
"""All routers by name. The configuration reads the same names from the decorators."""


def router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Register the decorated class, a frozen dataclass.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: type[Router]) -> type[Router]:
        if name in ROUTERS:
            raise ValueError(f"router {name!r} is registered twice")
        ROUTERS[name] = cls
        return cls

    return register


def make_router(name: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Router:
    """Return the router `name` with an adapter's settings and its own options.

    Raises:
        ValueError: there is no such router, or it does not have an option or refuses its value.
    """
    if name not in ROUTERS:
        raise ValueError(f"router={name!r} is unknown: choose from {', '.join(ROUTERS)}")
    if not isinstance(options, Mapping):
        raise ValueError(f"router_options={options!r:.80} must be options by name")
    defaults = {item.name: item.default for item in fields(ROUTERS[name])}
    pairs = [(own, key) for own in defaults for key in (own, f"router_{own}")]
    taken = {own: settings[key] for own, key in pairs if key in settings}
    taken = {own: value.value if isinstance(value, Enum) else value for own, value in taken.items()}
    free = [own for own in defaults if own not in taken]
    unknown = sorted(set(options) - set(free))
    if unknown:
        has = f"it has {', '.join(free)}" if free else "it has none"
        raise ValueError(f"router_options.{unknown[0]} is not an option of router={name}: {has}")
    own = {option: _option(option, value, defaults[option]) for option, value in options.items()}
    return ROUTERS[name](**taken, **own)


def _option(name: str, value: Any, default: Any) -> Any:
    """Return an option's value as a bool or an integer where its default is one, else as a
    float."""
    if isinstance(default, str):
        return value
    number = isinstance(value, int | float) and isfinite(value)
    if isinstance(default, bool):
        if number and value in (0, 1):
            return bool(value)
        raise ValueError(f"router_options.{name}={value} must be true or false")
    if not number or isinstance(value, bool):
        raise ValueError(f"router_options.{name}={value} must be a finite number")
    if isinstance(default, int):
        if value != int(value):
            raise ValueError(f"router_options.{name}={value} must be an integer")
        return int(value)
    return float(value)


def router_logits(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `x weight^T` (T, E), in `dtype`, else float32 (float64 for float64 input); the result
    is float32 at least. x: (T, in); weight: (E, in)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        logits = functional.linear(x.to(dtype or wide), weight.to(dtype or wide))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def ranked(logits: Tensor) -> Tensor:
    """Return all experts (T, E), the most probable first and of equal logits the lowest,
    everywhere: `topk` promises no order."""
    return logits.detach().sort(dim=-1, descending=True, stable=True).indices


def is_expert(experts: Tensor, num_experts: int) -> Tensor:
    """Return (..., E) bool: whether an entry of `experts` (...) is expert e. On a CPU `one_hot`
    reads the smallest and the largest entry first."""
    return experts.unsqueeze(-1) == torch.arange(num_experts, device=experts.device)


def normalised(weights: Tensor) -> Tensor:
    """Divide weights (T, K) by their sum over K; a row of zeros stays 0."""
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def router_fractions(
    routing: Routing, mask: Tensor | None, *, count_all: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute F, P of Eq. (9) and the number of tokens per expert, padding left out.

    mask: (T,), true for real tokens, or None. F (E,) is the fraction of tokens whose arg-max expert
    is i or, with `count_all`, of those that have i among their experts (then F sums to K, as in the
    official implementation). P (E,) is the mean router probability. The third result (E,) counts
    the tokens that were sent to each expert, whatever F counts.
    """
    num_experts = routing.probabilities.shape[-1]
    chosen = is_expert(routing.experts, num_experts).to(routing.probabilities.dtype)
    chosen = chosen * routing.filled.unsqueeze(-1)
    probabilities = routing.probabilities
    if mask is not None:
        keep = mask.to(probabilities.dtype).unsqueeze(-1)
        chosen = chosen * keep.unsqueeze(-1)
        # `where` and not a product: a padding row may hold NaN, and 0 * NaN is NaN.
        probabilities = torch.where(mask.unsqueeze(-1), probabilities, 0.0)
        tokens = keep.sum().clamp(min=1)
    else:
        tokens = float(probabilities.shape[0])
    counts = chosen.sum(dim=(0, 1))
    fraction = (counts if count_all else chosen[:, 0].sum(dim=0)) / tokens
    return fraction, probabilities.sum(dim=0) / tokens, counts


def router_loss(fractions: Tensor, probabilities: Tensor, *, pooled: bool) -> Tensor:
    """Compute Eq. (8) without its coefficient: `E * sum_i F_i P_i`.

    fractions, probabilities: (layers, E). Computed per layer and averaged or, with `pooled`, from
    the statistics over the tokens of all layers together (each layer sees the same tokens, so
    pooled statistics are means over layers). 1 at perfect balance when F counts the arg-max expert,
    K when it counts all chosen ones.
    """
    if pooled:
        fractions, probabilities = fractions.mean(dim=0), probabilities.mean(dim=0)
    return fractions.shape[-1] * (fractions * probabilities).sum(dim=-1).mean()
