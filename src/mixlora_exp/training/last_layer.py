"""The last decoder layer at the positions that carry a loss alone.

Only a norm and the output projection follow it, which take some columns (`logits_to_keep`). What it
makes of the others reaches neither the loss nor a gradient, so its feed-forward block and its
attention's output projection leave them out. A router decides about all rows all the same, since
its loss is a mean over them; the output projection before it then has all rows too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_exp.adapters.layer import MixLoraFeedForward
from mixlora_exp.adapters.mixtures.layer import MixtureLinear
from mixlora_exp.config.schema_method import FEED_FORWARD_BLOCK, FEED_FORWARD_TARGETS
from mixlora_exp.training.compiled import decoder_layers


class KeptRows:
    """The rows that the last layer computes. `rows`: their numbers in the flattened batch, None for
    all. They stay until the next pass: gradient checkpointing computes the layer once more in the
    backward pass."""

    rows: Tensor | None = None

    def use(self, shape: torch.Size, columns: Tensor | None) -> Tensor | None:
        """Take those in some columns of a batch of this shape (sequences, tokens), and return their
        numbers; all, and None, without columns."""
        self.rows = None
        if columns is not None and len(columns) < shape[1]:
            starts = torch.arange(shape[0], device=columns.device) * shape[1]
            self.rows = (starts.unsqueeze(1) + columns).flatten()
        return self.rows


def _at_rows(module: nn.Module, kept: KeptRows) -> Callable[..., Tensor]:
    """Return the module's forward pass, with zeros for what is not kept."""
    own, routed = module.forward, isinstance(module, MixLoraFeedForward)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kept.rows is None:
            return own(x, *args, **kwargs)
        rows = x.flatten(0, -2)
        # One sequence of them, which a layer takes as well as rows.
        y = own(x, kept=kept.rows) if routed else own(rows[kept.rows].unsqueeze(0)).squeeze(0)
        all_rows = y.new_zeros(len(rows), y.shape[-1]).index_copy(0, kept.rows, y)
        return all_rows.view(*x.shape[:-1], y.shape[-1])

    return forward


def _modules(base: PreTrainedModel) -> list[nn.Module]:
    """Return modules of the last layer that can skip rows; none in a layer of another form."""
    last = decoder_layers(base)[-1]
    block = getattr(last, FEED_FORWARD_BLOCK, None)
    if isinstance(block, MixLoraFeedForward):
        # A kernel that draws masks takes them for all rows.
        return [] if block.kernel_on(base.device).draws_masks else [block]
    output = getattr(getattr(last, "self_attn", None), "o_proj", None)
    plain = all(hasattr(block, name) for name in FEED_FORWARD_TARGETS)
    if not plain or output is None:
        return []
    # Routers of single projections would see, and report on, the kept rows alone.
    routed = any(isinstance(m, MixtureLinear) for one in (output, block) for m in one.modules())
    return [] if routed else [output, block]


@contextmanager
def last_layer_at_kept_rows(base: PreTrainedModel) -> Iterator[KeptRows]:
    """Within this context the last decoder layer of `base` computes the rows of the yielded
    `KeptRows` alone, by one adapter."""
    kept = KeptRows()
    modules = _modules(base)
    for module in modules:
        module.forward = _at_rows(module, kept)
    try:
        yield kept
    finally:
        for module in modules:
            del module.forward
