"""Which expert took which token: the routers' decisions in one forward pass, read by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from mixlora_exp.adapters.mixed_adapters import routed_layers_of
from mixlora_exp.errors import UserError

__all__ = ["TokenRouting", "routing_of"]

NOBODY = -1
"""In place of an expert's number: padding, or a slot that holds no expert."""


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """The decisions of L routers for a batch of B sequences of N tokens, on the CPU.

    `layers`: the routers' module names. `experts` (L, B, N, K) int64: the chosen experts, the most
    probable first, -1 for padding and for slots without an expert (K is the largest of all
    routers'). `weights` (L, B, N, K) float32: what the experts' outputs are multiplied by, 0 where
    there is none. `num_experts`: E, the largest of all routers'.
    """

    layers: tuple[str, ...]
    experts: Tensor
    weights: Tensor
    num_experts: int

    def load(self) -> Tensor:
        """Return (L, E): the share of each router's filled slots that each expert has."""
        numbers = torch.arange(self.num_experts)
        counts = (self.experts.flatten(1)[..., None] == numbers).sum(dim=1)
        return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


@torch.no_grad()
def routing_of(model: PeftModel, batch: Mapping[str, Tensor]) -> TokenRouting:
    """Run a batch through a model as when scoring (no dropout), and return where its tokens went.

    model: with one active adapter that has routers. batch: `input_ids` (B, N), and an
    `attention_mask` where there is padding.

    Raises:
        UserError: several adapters are active, or the active one has no router.
    """
    active = model.active_adapters
    layers = routed_layers_of(model, active[0]) if len(active) == 1 else {}
    if not layers:
        raise UserError(f"routing_of needs one active adapter with routers, not {active}")
    shape, training = batch["input_ids"].shape, model.training
    model.eval()
    try:
        model(**{**batch, "use_cache": False})
    finally:
        model.train(training)
    found = [layer.routings[active[0]] for layer in layers.values()]
    most = max(routing.experts.shape[1] for routing in found)
    experts = torch.full((len(found), *shape, most), NOBODY)
    weights = torch.zeros(experts.shape)
    real = batch.get("attention_mask", torch.ones(shape)).bool().cpu()
    for number, routing in enumerate(found):
        here = (*shape, routing.experts.shape[1])
        filled = routing.filled.cpu().view(here) & real[..., None]
        chosen, weight = (t.cpu().view(here) for t in (routing.experts, routing.weights.float()))
        experts[number, ..., : here[2]] = chosen.where(filled, NOBODY)
        weights[number, ..., : here[2]] = weight.where(filled, 0.0)
    return TokenRouting(tuple(layers), experts, weights, max(r.logits.shape[1] for r in found))
