"""Rows of tokens that hold several sequences, without padding to a common length.

All layers except attention are token-wise, so sequences are concatenated to (1, tokens): the
batches of several adapters, or the examples of one batch (`data.packing`). Attention splits them
again, and computes each sequence separately.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "packed"
Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's batch in the row: its slice, its shape (sequences, tokens), and its masks in
    the form of the model's attention implementation; `window`: for layers with a sliding window.

    For a batch that is packed itself, `unpack` (examples, longest) has the columns of each
    example's tokens, with column 0 for padding at its end, and `back` (tokens,) the place of each
    column among those of `unpack`.
    """

    rows: slice
    shape: tuple[int, int]
    mask: Tensor | None
    window: Tensor | None = None
    unpack: Tensor | None = None
    back: Tensor | None = None

    def split(self, x: Tensor) -> Tensor:
        """x (1, heads, all tokens, head size) -> (sequences, heads, tokens, head size)."""
        own = x[0, :, self.rows]
        if self.unpack is None:
            return own.unflatten(1, self.shape).transpose(0, 1)
        found = own.index_select(1, self.unpack.flatten())
        return found.unflatten(1, self.unpack.shape).transpose(0, 1)

    def joined(self, y: Tensor) -> Tensor:
        """y (sequences, tokens, heads, head size) -> (1, own tokens, heads, head size)."""
        y = y.flatten(0, 1)
        return (y if self.back is None else y.index_select(0, self.back)).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class Packed:
    """Concatenated batches. `input_ids` and `position_ids`: (1, tokens); `parts`: by adapter."""

    input_ids: Tensor
    position_ids: Tensor
    parts: dict[str, Part]
    attention: str
    """The attention implementation that computes each part."""


def examples_of(position_ids: Tensor) -> Tensor:
    """Return (tokens,) int64: the number of each token's example, from 0, in a row (1, tokens) in
    which the positions of each example begin with 0."""
    return (position_ids.flatten() == 0).cumsum(0) - 1


def pack_batches(model: PreTrainedModel, batches: Mapping[str, Batch], attention: str) -> Packed:
    """Concatenate the batches of several adapters, in the given order.

    Each batch has `input_ids`, `attention_mask` and `position_ids`, (sequences, tokens), or is a
    packed batch of `Collator`.
    """
    parts, start = {}, 0
    with _implementation(model, attention):
        for name, batch in batches.items():
            rows = slice(start, start + batch["input_ids"].numel())
            start = rows.stop
            parts[name] = _part(model, batch, rows)

    def joined(field: str) -> Tensor:
        return torch.cat([batch[field].flatten() for batch in batches.values()]).unsqueeze(0)

    return Packed(joined("input_ids"), joined("position_ids"), parts, attention)


def _part(model: PreTrainedModel, batch: Batch, rows: slice) -> Part:
    ids, unpack, back = batch["input_ids"], batch.get("unpack"), None
    shape, real, positions = ids.shape, batch["attention_mask"], batch["position_ids"]
    if unpack is not None:
        back = examples_of(positions) * unpack.shape[1] + positions.flatten()
        # Padding stands behind each example, where a causal mask hides it.
        shape, real, positions = unpack.shape, None, None
    # Only its shape, dtype and device are used.
    dtype = next(model.parameters()).dtype
    like = torch.empty((*shape, 0), dtype=dtype, device=ids.device)
    given: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": like,
        "attention_mask": real,
        "past_key_values": None,
        "position_ids": positions,
    }
    window = None
    if getattr(model.config, "sliding_window", None) is not None:
        window = create_sliding_window_causal_mask(**given)
    return Part(rows, tuple(ids.shape), create_causal_mask(**given), window, unpack, back)


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[str]:
    """Within this context the model's attention accepts `packed=Packed(...)`; yields the name of
    its previous implementation, which computes the parts."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    inner = model.config._attn_implementation
    with _implementation(model, NAME):
        yield inner


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each part. query, key, value: (1, heads, tokens, head size); returns
    (1, tokens, heads, head size)."""
    # Eager attention is defined in each model's own file and not registered.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(packed.attention, eager)
    found = []
    for part in packed.parts.values():
        mask = part.mask if kwargs.get("sliding_window") is None else part.window
        y, _ = attend(module, *map(part.split, (query, key, value)), mask, **kwargs)
        found.append(part.joined(y))
    return torch.cat(found, dim=1), None
