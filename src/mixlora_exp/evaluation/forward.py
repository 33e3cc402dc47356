"""Batched forward passes for scoring: fixed batches, last positions only, dropout off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixlora_exp.data.collator import pad_left

__all__ = ["Scorer", "batches"]

HEAD_CHUNK = 2**14


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


def _full_precision_head(
    module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor | None:
    """Forward hook of the output projection: its product again, in float32.

    In bf16 a logit near 24 is a multiple of 1/8, and the first of several tied answers would win.
    """
    if module.weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    hidden = args[0].float()
    with torch.autocast(hidden.device.type, enabled=False):
        # In chunks, for a whole vocabulary in float32 may not fit beside the model.
        parts = [hidden @ part.float().T for part in module.weight.split(HEAD_CHUNK)]
    return torch.cat(parts, dim=-1)


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
        head = self.model.get_output_embeddings()
        hook = head.register_forward_hook(_full_precision_head)
        try:
            with self.autocast:
                length = batch["input_ids"].shape[1]
                # Column numbers, for the reason given in `Collator`.
                kept = torch.arange(length - keep, length, device=self.device)
                output = self.model(**batch, logits_to_keep=kept, use_cache=False)
        finally:
            hook.remove()
        report = getattr(getattr(self.model, "base_model", None), "router_report", None)
        if report is not None:
            counts = report.counts.double()
            self._counts = counts if self._counts is None else self._counts + counts
        return output.logits[:, -keep:].float()

    def routes(self, lengths: Sequence[int]) -> list[list[Tensor]]:
        """Of the last pass: per row, the experts of its real tokens, layer by layer, (tokens, K);
        empty without experts."""
        layers = [
            module.routing.experts.view(len(lengths), -1, module.routing.experts.shape[-1])
            for module in self.model.modules()
            if getattr(module, "routing", None) is not None
        ]
        return [
            [layer[row, layer.shape[1] - length :] for layer in layers]
            for row, length in enumerate(lengths)
        ]

    def take_expert_load(self) -> list[list[float]] | None:
        """Share of (token, slot) pairs per layer and expert since the last call; None without
        experts."""
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        return (counts / counts.sum(dim=-1, keepdim=True)).tolist()
