"""Packs batches of several adapters into one row of tokens, without padding to a common length.

All layers except attention are token-wise, so the batches are concatenated to (1, tokens).
Attention splits them again, and computes each batch separately.
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
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "packed"
Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's batch in the row: its slice, its shape (sequences, tokens), and its mask in the
    form of the model's attention implementation."""

    rows: slice
    shape: tuple[int, int]
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Packed:
    """Concatenated batches. `input_ids` and `position_ids`: (1, tokens); `parts`: by adapter."""

    input_ids: Tensor
    position_ids: Tensor
    parts: dict[str, Part]
    attention: str
    """The attention implementation that computes each part."""


def pack_batches(model: PreTrainedModel, batches: Mapping[str, Batch], attention: str) -> Packed:
    """Concatenate the batches of several adapters, in the given order.

    Each batch has `input_ids`, `attention_mask` and `position_ids`, (sequences, tokens).
    """
    parts, start = {}, 0
    with _implementation(model, attention):
        for name, batch in batches.items():
            ids = batch["input_ids"]
            rows = slice(start, start + ids.numel())
            start = rows.stop
            # Only its shape, dtype and device are used.
            like = torch.empty(
                (*ids.shape, 0), dtype=_products_dtype(model, ids.device), device=ids.device
            )
            mask = create_causal_mask(
                config=model.config,
                inputs_embeds=like,
                attention_mask=batch["attention_mask"],
                past_key_values=None,
                position_ids=batch["position_ids"],
            )
            parts[name] = Part(rows, tuple(ids.shape), mask)

    def joined(field: str) -> Tensor:
        return torch.cat([batch[field].flatten() for batch in batches.values()]).unsqueeze(0)

    return Packed(joined("input_ids"), joined("position_ids"), parts, attention)


def _products_dtype(model: PreTrainedModel, device: torch.device) -> torch.dtype:
    return next(model.parameters()).dtype


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
        own = [
            tensor[0, :, part.rows].unflatten(1, part.shape).transpose(0, 1)
            for tensor in (query, key, value)
        ]
        y, _ = attend(module, *own, part.mask, **kwargs)
        found.append(y.reshape(1, -1, *y.shape[-2:]))
    return torch.cat(found, dim=1), None
