"""Base class and registry of mixtures of LoRA experts in one linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mixlora_exp.kernels.router_base import Router
from mixlora_exp.kernels.shapes import Routing

__all__ = [
    "MIXTURES",
    "Mixture",
    "Sizes",
    "dense_weights",
    "make_mixture",
    "mixture",
    "stacked_product",
]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a linear layer W (outputs, inputs) and its LoRA experts."""

    experts: int
    rank: int
    inputs: int
    outputs: int


def uniform(shape: Sequence[int], width: int) -> Tensor:
    """Draw a tensor uniform in +-1/sqrt(width), as PyTorch fills a linear layer of `width`
    inputs."""
    return torch.empty(*shape).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """y = W x + b + branch(drop(x)), by default with
    `branch(x) = s sum_e w_e B_e A_e x` and w the router's weights for the undropped x.

    A subclass is a frozen dataclass; its fields are the method's own options, numbers all, which
    `mixture_options` sets by name. The router is chosen for the adapter, `router` is its default.
    """

    router: ClassVar[str | None] = "top_k"
    """None: the method has one expert and no router."""
    mergeable: ClassVar[bool] = False
    """True if the branch is one matrix for all inputs (see `delta`)."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Names of the weights that are stored but not trained."""
    roles: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B"}
    """Which of LoRA+'s two learning rates the trained weights have, by their names: that of A or
    that of B."""
    own_scale: ClassVar[bool] = False
    """True if `scaling` ignores alpha / R."""
    typed_loss: ClassVar[bool] = False
    """True if the loss needs the types of tasks, `method.type1_tasks`."""
    loss_options: ClassVar[tuple[str, ...]] = ()
    """Options that act on the loss alone."""
    starts_from_weight: ClassVar[bool] = False
    """True if `initial` decomposes the weight, which takes minutes for large ones."""
    starts_from_gradient: ClassVar[bool] = False
    """True if training starts by `from_gradient(gradient, rank)`, which returns the weights of a
    layer by name, given the gradient (out, in) of the loss by its weight."""

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights by name, without the router's: A (E, R, in), B (E, out,
        R).

        Raises:
            ValueError: the method cannot have these sizes.
        """
        return {
            "A": (sizes.experts, sizes.rank, sizes.inputs),
            "B": (sizes.experts, sizes.outputs, sizes.rank),
        }

    def saved_numbers(self, sizes: Sizes) -> int:
        """Return numbers per row that `branch` saves for the backward pass, for plans: A x and,
        with a router, its products with the weights."""
        weighted = 0 if self.router is None else sizes.experts
        return sizes.rank * (self.shapes(sizes)["A"][0] + weighted)

    def scaling(self, sizes: Sizes, usual: float) -> float:
        """Return s, by default `usual`: alpha / R, as in LoRA."""
        return usual

    def initial(self, sizes: Sizes, weight: Tensor, scaling: float) -> dict[str, Tensor]:
        """Return new weights by name, drawn from torch's default generator on the CPU. weight: W
        (out, in)."""
        shapes = self.shapes(sizes)
        return {"A": uniform(shapes["A"], sizes.inputs), "B": torch.zeros(shapes["B"])}

    def branch(
        self, x: Tensor, weights: Tensor | None, parts: Mapping[str, Tensor], scaling: float
    ) -> Tensor:
        """Compute the branch (T, out) of rows x (T, in) after dropout.

        weights: (T, E), 0 for an expert that a row does not have, None without a router; parts: by
        name, in the dtype of x.
        """
        return scaling * stacked_product(x, parts["A"], parts["B"], weights)

    def delta(self, parts: Mapping[str, Tensor], scaling: float) -> Tensor:
        """Return the branch as a matrix (out, in), for a method that is `mergeable`.

        Raises:
            NotImplementedError: the method is not mergeable.
        """
        raise NotImplementedError

    def statistics(
        self, router: Router, routing: Routing, mask: Tensor | None, types: Tensor | None
    ) -> dict[str, Tensor]:
        """Return what the loss needs of one layer's decision; see `Router.statistics`.

        types: (sequences,), 0 or 1 by the kind of a sequence's task, None where the batch does not
        say; sequences are equally long and follow one another in the rows.
        """
        return router.statistics(routing, mask)

    def auxiliary_loss(self, router: Router, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of the layers in `statistics`, without its coefficient."""
        return router.auxiliary_loss(statistics)


MIXTURES: dict[str, type[Mixture]] = {}
"""All mixtures by name. The configuration reads the same names from the decorators."""


def mixture(name: str) -> Callable[[type[Mixture]], type[Mixture]]:
    """Register the decorated class, a frozen dataclass.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: type[Mixture]) -> type[Mixture]:
        if name in MIXTURES:
            raise ValueError(f"mixture {name!r} is registered twice")
        MIXTURES[name] = cls
        return cls

    return register


def make_mixture(name: str, options: Mapping[str, Any]) -> Mixture:
    """Return the mixture `name` with its options.

    Raises:
        ValueError: there is no such mixture, or it does not have an option, or not with this value.
    """
    if name not in MIXTURES:
        raise ValueError(f"mixture={name!r} is unknown: choose from {', '.join(MIXTURES)}")
    known = [item.name for item in fields(MIXTURES[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"mixture_options.{unknown[0]} is not an option of {name}: {has}")
    return MIXTURES[name](**options)


def dense_weights(routing: Routing) -> Tensor:
    """Spread the routing's weights (T, K) over all experts: (T, E), 0 for an expert that a row does
    not have."""
    empty = torch.zeros_like(routing.probabilities, dtype=routing.weights.dtype)
    return empty.scatter_add(1, routing.experts, routing.weights)


def stacked_product(x: Tensor, a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    """Compute `sum_e w_e B_e A_e x` for rows x (T, in), as two products over all experts: (T, out).

    a: (E, R, in), or (1, R, in) for one A that all experts share; b: (E, out, R); weights: (T, E),
    None for 1 everywhere.
    """
    z = functional.linear(x, a.flatten(0, 1)).unflatten(1, a.shape[:2])
    if weights is not None:
        z = z * weights.to(z.dtype).unsqueeze(2)
    z = z.expand(-1, b.shape[0], -1)
    return functional.linear(z.flatten(1), b.permute(1, 0, 2).flatten(1))
