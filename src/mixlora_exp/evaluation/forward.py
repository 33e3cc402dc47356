"""Batched forward passes for scoring: fixed batches, last positions only, dropout off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixlora_exp.data.collator import pad_left

__all__ = ["Scorer", "batches"]


def batches(lengths: Sequence[int], keys: Sequence[str], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length whose padded size stays within `batch_tokens`.

    The batches depend on the set of (length, key) pairs alone, so the order in which items come
    changes nothing, not even a bit. A row longer than `batch_tokens` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], keys[i]))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Scorer:
    """Runs a model over rows of tokens and counts which experts they went to."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        autocast: AbstractContextManager,
        batch_tokens: int,
    ) -> None:
        self.model = model.eval()
        self.pad_id = tokenizer.pad_token_id
        self.autocast = autocast
        self.batch_tokens = batch_tokens
        self.device = next(model.parameters()).device
        self._counts: Tensor | None = None

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Logits of the last `keep` positions of each row, (rows, keep, vocabulary), float32."""
        batch = {k: v.to(self.device) for k, v in pad_left(rows, self.pad_id).items()}
        with self.autocast:
            length = batch["input_ids"].shape[1]
            # Column numbers, for the reason given in `Collator`.
            kept = torch.arange(length - keep, length, device=self.device)
            output = self.model(**batch, logits_to_keep=kept, use_cache=False)
        report = getattr(getattr(self.model, "base_model", None), "router_report", None)
        if report is not None:
            counts = report.counts.double()
            self._counts = counts if self._counts is None else self._counts + counts
        return output.logits[:, -keep:].float()

    def take_expert_load(self) -> list[list[float]] | None:
        """Share of (token, slot) pairs per layer and expert since the last call; None without
        experts."""
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        return (counts / counts.sum(dim=-1, keepdim=True)).tolist()

    def smallest_router_gap(self) -> float:
        """Of the last pass: the least difference, over layers and tokens, between the router logits
        of the last expert chosen and the first one left out; infinite without a choice."""
        gap = float("inf")
        for module in self.model.modules():
            routing = getattr(module, "routing", None)
            if routing is None or routing.experts.shape[-1] == routing.logits.shape[-1]:
                continue
            top = routing.logits.topk(routing.experts.shape[-1] + 1, dim=-1).values
            gap = min(gap, float((top[:, -2] - top[:, -1]).min()))
        return gap
