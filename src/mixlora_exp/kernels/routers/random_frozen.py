"""A control: top-k routing by a router that is drawn once and never trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixlora_exp.kernels.router_base import router
from mixlora_exp.kernels.routers.top_k import TopK

__all__ = ["RandomFrozen"]


@router("random_frozen")
@dataclass(frozen=True, kw_only=True)
class RandomFrozen(TopK):
    """`top_k`, whose matrix keeps its initial values; the adapter's file has them. The load-balance
    loss still reaches what comes before the router."""

    frozen: ClassVar[bool] = True
