"""The output projection in float32, whatever stands in its place: a plain one, or an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["full_precision_head"]

NARROW = (torch.bfloat16, torch.float16)
HEAD_CHUNK = 2**14
"""Rows of the vocabulary matrix that are held in float32 at once."""


class _Forward(nn.Module):
    """A module's own forward pass, without its hooks."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module = module
        self.own = forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.own(*args, **kwargs)


def _plain(linear: nn.Linear, hidden: Tensor) -> Tensor:
    # In chunks, for a whole vocabulary in float32 may not fit beside the model.
    parts = [hidden @ part.to(hidden.dtype).T for part in linear.weight.split(HEAD_CHUNK)]
    logits = torch.cat(parts, dim=-1)
    return logits if linear.bias is None else logits + linear.bias.to(hidden.dtype)


@contextmanager
def full_precision_head(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the output projection of `model`, which is given, computes in float32:
    it takes hidden states of any precision and gives the logits that its weights, as they are,
    have in float32, autocast or not.

    In bf16 a logit near 24 is a multiple of 1/8, and the first of several tied answers would win.
    Where an adapter (or a wrapper of PEFT's) stands in the projection's place, that module computes
    by its own forward pass, so that whatever it does is in the logits; its weights are in float32
    meanwhile, and a copy of the vocabulary matrix in float32 exists during each call.
    """
    head = model.get_output_embeddings()
    replaced = vars(head).get("forward")
    own = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = {name: p for name, p in head.named_parameters() if p.dtype in NARROW}
            if not narrow:
                return own(hidden, *args, **kwargs)
            if type(head) is nn.Linear:
                return _plain(head, hidden)
            for layer in head.modules():
                if isinstance(layer, BaseTunerLayer) and layer.merged and layer.disable_adapters:
                    # The forward pass would take the adapter out of the copies alone.
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
