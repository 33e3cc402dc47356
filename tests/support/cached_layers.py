"""Layers whose adapter weights are kept in the precision of the products."""

from __future__ import annotations

from torch import nn

from mixlora_exp.adapters.weight_cache import CachesWeights


def layers_of(model: nn.Module) -> list[CachesWeights]:
    return [module for module in model.modules() if isinstance(module, CachesWeights)]
