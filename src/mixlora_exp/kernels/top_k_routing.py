"""Top-K routing by the softmax over all experts, in plain operations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixlora_exp.kernels.router_base import normalised, ranked, router_logits
from mixlora_exp.kernels.shapes import Routing


def route(x: Tensor, weight: Tensor, top_k: int, dtype: torch.dtype | None = None) -> Routing:
    """softmax(x weight^T), top-k, normalised over the k (paper, Section 3.2).

    x: (T, D); weight: (E, D), no bias; dtype: of the product, see `router_logits`.
    """
    logits = router_logits(x, weight, dtype)
    routing = most_probable(logits, logits.softmax(dim=-1), top_k)
    return replace(routing, weights=normalised(routing.weights))


def most_probable(logits: Tensor, probabilities: Tensor, top_k: int) -> Routing:
    """Return the K most probable experts of each row, with their probabilities as they are.

    logits, probabilities: (T, E). Equal logits go to the lowest expert.
    """
    experts = ranked(logits)[:, :top_k].contiguous()
    return Routing(logits, probabilities, experts, probabilities.gather(1, experts))
