"""Batched forward passes for scoring: fixed batches, few positions' logits, no dropout unless a
switch asks for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixlora_exp.data.collator import pad_left
from mixlora_exp.evaluation.head import full_precision_head
from mixlora_exp.evaluation.packing import PackedQuestion, Request, pack, pad_packed

__all__ = ["Scorer", "batches"]

LOGIT_ROWS = 256
"""Positions whose logits over the vocabulary are held at once."""


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
    """Runs a model over rows of tokens and counts which experts they went to.

    `group` arguments name what each row belongs to (a task); experts are counted apart for each.
    With `dropout_seed` the adapter's dropout stays on, as in the official packages, drawn from
    that seed; the caller's generator is set to it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        autocast: AbstractContextManager,
        batch_tokens: int,
        dropout_seed: int | None = None,
    ) -> None:
        self.model = model.eval()
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
            # The adapter's layers alone: the model as a whole computes no router loss.
            for module in model.modules():
                if hasattr(module, "lora_dropout"):
                    module.train()
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id
        self.autocast = autocast
        self.batch_tokens = batch_tokens
        self.device = next(model.parameters()).device
        self._counts: dict[str, Tensor] = {}

    @contextmanager
    def full_precision(self) -> Iterator[nn.Module]:
        """Within this context the output projection, which is given, computes in float32."""
        with self.autocast, full_precision_head(self.model) as head:
            yield head

    def logits(
        self, rows: Sequence[Sequence[int]], keep: int, groups: Sequence[str] | None = None
    ) -> Tensor:
        """Logits of the last `keep` positions of each row, (rows, keep, vocabulary), float32."""
        found = self.run_logits(rows, keep)
        self._count([len(row) for row in rows], groups)
        return found

    def generate(self, rows: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """At most `new_tokens` tokens after each row, the likeliest one each time."""
        return self.run_generate(rows, new_tokens)

    # The passes themselves, which scorers of several adapters share.

    @torch.no_grad()
    def run_logits(self, rows: Sequence[Sequence[int]], keep: int, **kwargs: Any) -> Tensor:
        batch = {k: v.to(self.device) for k, v in pad_left(rows, self.pad_id).items()}
        with self.full_precision():
            length = batch["input_ids"].shape[1]
            # Column numbers, for the reason given in `Collator`.
            kept = torch.arange(length - keep, length, device=self.device)
            output = self.model(**batch, logits_to_keep=kept, use_cache=False, **kwargs)
        return output.logits[:, -keep:].float()

    @torch.no_grad()
    def run_generate(
        self, rows: Sequence[Sequence[int]], new_tokens: int, **kwargs: Any
    ) -> list[list[int]]:
        batch = {k: v.to(self.device) for k, v in pad_left(rows, self.pad_id).items()}
        del batch["position_ids"]  # `generate` counts them from the mask.
        with self.full_precision():
            output = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=self.pad_id,
                **kwargs,
            )
        return output[:, batch["input_ids"].shape[1] :].tolist()

    def log_likelihoods(
        self,
        questions: Sequence[Sequence[Request]],
        keys: Sequence[str],
        groups: Sequence[str] | None = None,
    ) -> list[list[tuple[float, bool]]]:
        """Per question and request: the sum of the scored tokens' log-probabilities in nats, and
        whether each of them is the likeliest one. A question's common prefix is computed once.

        `keys` tell questions of one length apart, so that their order changes nothing.
        """
        packed = [pack(requests) for requests in questions]
        found: list[list[tuple[float, bool]]] = [[] for _ in packed]
        for batch in batches([len(p.tokens) for p in packed], keys, self.batch_tokens):
            chosen = [packed[i] for i in batch]
            scores = self._score(chosen, None if groups is None else [groups[i] for i in batch])
            for i, score in zip(batch, scores, strict=True):
                found[i] = score
        return found

    def _score(
        self, questions: Sequence[PackedQuestion], groups: Sequence[str] | None
    ) -> list[list[tuple[float, bool]]]:
        found = self.run_scores(questions)
        self._count([len(q.tokens) for q in questions], groups)
        return found

    @torch.no_grad()
    def run_scores(
        self, questions: Sequence[PackedQuestion], **kwargs: Any
    ) -> list[list[tuple[float, bool]]]:
        batch = pad_packed(questions, self.pad_id, next(self.model.parameters()).dtype)
        length = batch["input_ids"].shape[1]
        targets = [
            (row, column + length - len(question.tokens), token)
            for row, question in enumerate(questions)
            for request in question.targets
            for column, token in request
        ]
        rows, columns, tokens = torch.tensor(targets, device=self.device).T
        kept: list[Tensor] = []

        def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            # The logits of all positions would not fit; the model's own pass gets one.
            kept.append(args[0][rows, columns])
            return (args[0][:1, :1],)

        with self.full_precision() as head:
            hook = head.register_forward_pre_hook(gather)
            try:
                inputs = {k: v.to(self.device) for k, v in batch.items()}
                self.model(**inputs, use_cache=False, **kwargs)
            finally:
                hook.remove()
            likelihoods, greedy = _likelihoods(head, kept[0], tokens)
        values, best = iter(likelihoods.tolist()), iter(greedy.tolist())
        return [
            [_total([(next(values), next(best)) for _ in request]) for request in question.targets]
            for question in questions
        ]

    def routes(self, lengths: Sequence[int]) -> list[list[Tensor]]:
        """Of the last pass: per row, the experts of its real tokens, layer by layer, (tokens, K),
        -1 for an empty slot; empty without experts."""
        routings = (getattr(module, "routing", None) for module in self.model.modules())
        layers = [
            r.experts.masked_fill(~r.filled, -1).view(len(lengths), -1, r.experts.shape[-1])
            for r in routings
            if r is not None
        ]
        return [
            [layer[row, layer.shape[1] - length :] for layer in layers]
            for row, length in enumerate(lengths)
        ]

    def _experts(self) -> int:
        """How many experts the last pass chose from; 0 without any."""
        report = getattr(getattr(self.model, "base_model", None), "router_report", None)
        return 0 if report is None else report.counts.shape[-1]

    def _count(self, lengths: Sequence[int], groups: Sequence[str] | None) -> None:
        """Add the last pass to the counts of its rows' groups."""
        experts = self._experts()
        if not experts:
            return
        by_group: dict[str, list[list[Tensor]]] = defaultdict(list)
        for row, route in enumerate(self.routes(lengths)):
            by_group["" if groups is None else groups[row]].append(route)
        for group, routes in by_group.items():
            layers = [torch.cat(parts).flatten() for parts in zip(*routes, strict=True)]
            chosen = (layer[layer >= 0] for layer in layers)
            counts = torch.stack([layer.bincount(minlength=experts) for layer in chosen]).double()
            self._counts[group] = self._counts.get(group, 0) + counts

    def take_expert_load(self, group: str = "") -> list[list[float]] | None:
        """Share of (token, slot) pairs per layer and expert since the last call; None without
        experts. A token that several options share is counted once."""
        counts = self._counts.pop(group, None)
        if counts is None:
            return None
        return (counts / counts.sum(dim=-1, keepdim=True)).tolist()


def _likelihoods(
    head: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token (N) after its hidden state (N, d), and whether it leads."""
    values, greedy = [], []
    for part, wanted in zip(hidden.split(LOGIT_ROWS), tokens.split(LOGIT_ROWS), strict=True):
        logits = head(part).float()
        ids = wanted.unsqueeze(-1)
        values.append(logits.gather(-1, ids).squeeze(-1) - logits.logsumexp(dim=-1))
        greedy.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(values), torch.cat(greedy)


def _total(scored: Sequence[tuple[float, bool]]) -> tuple[float, bool]:
    return sum(value for value, _ in scored), all(best for _, best in scored)
