"""MoLA (Gao et al. 2024): sparse LoRA experts in every projection, more in higher layers."""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_exp.kernels.mixture_base import Mixture, mixture

__all__ = ["Mola"]


@mixture("mola")
@dataclass(frozen=True, kw_only=True)
class Mola(Mixture):
    """`s sum_{e in top-K} w_e B_e A_e x`, w the softmax over all experts, normalised over the K.

    How many experts a layer has is `num_experts`. Unlike the original, a row that goes to several
    experts has one dropout mask.
    """
