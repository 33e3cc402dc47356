"""Computes the output projection in float32, with or without an adapter on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

NARROW = (torch.bfloat16, torch.float16)
HEAD_CHUNK = 2**14
"""Number of rows of the vocabulary matrix that are in float32 at once."""


class _Forward(nn.Module):
    """A module's own forward pass, without its hooks."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module = module
        self.own = forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.own(*args, **kwargs)


def _plain(linear: nn.Linear, hidden: Tensor, given: torch.dtype) -> Tensor:
    """Compute the output projection of `hidden` in float32. hidden: float32, of values that `given`
    holds."""
    if hidden.is_cuda and given is linear.weight.dtype:
        # Products of narrow numbers summed in float32: nothing is cast, which for each generated
        # token would take several times as long as the product.
        rows = hidden.to(given).flatten(0, -2)
        logits = torch.mm(rows, linear.weight.T, out_dtype=hidden.dtype)
        logits = logits.unflatten(0, hidden.shape[:-1])
    else:
        # In chunks: a float32 copy of the whole vocabulary matrix may not fit in memory.
        parts = [hidden @ part.to(hidden.dtype).T for part in linear.weight.split(HEAD_CHUNK)]
        logits = torch.cat(parts, dim=-1)
    return logits if linear.bias is None else logits + linear.bias.to(hidden.dtype)


@contextmanager
def full_precision_head(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the output projection of `model`, which is yielded, computes in float32,
    from hidden states of any precision and with or without autocast.

    In bf16 a logit near 24 is a multiple of 1/8, and the first of several tied answers would win.
    An adapter (or another PEFT wrapper) on the projection computes with its own forward pass on
    float32 copies of its weights, including the vocabulary matrix, which exist during each call.
    """
    head = model.get_output_embeddings()
    replaced = vars(head).get("forward")
    own = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = hidden.dtype
        hidden = hidden.to(torch.promote_types(given, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = {name: p for name, p in head.named_parameters() if p.dtype in NARROW}
            if not narrow:
                return own(hidden, *args, **kwargs)
            if type(head) is nn.Linear:
                return _plain(head, hidden, given)
            for layer in head.modules():
                if isinstance(layer, BaseTunerLayer) and layer.merged and layer.disable_adapters:
                    # Otherwise the forward pass would unmerge only the copies.
                    layer.unmerge()
            wide = {f"module.{name}": p.to(hidden.dtype) for name, p in narrow.items()}
            return functional_call(_Forward(head, own), wide, (hidden, *args), kwargs)

    head.forward = forward
    try:
        yield head
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced
