"""AdaMoLE (Liu and Luo 2024): a threshold that is learned decides how many experts a token gets."""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_exp.kernels.mixture_base import Mixture, mixture

__all__ = ["AdaMole"]


@mixture("adamole")
@dataclass(frozen=True, kw_only=True)
class AdaMole(Mixture):
    """`s sum_e w_e B_e A_e x`, w from the router `threshold`, whose options have the threshold's
    upper end and the form of the loss. One dropout mask serves all experts."""

    router = "threshold"
