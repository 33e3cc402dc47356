"""Batched forward passes for scoring: deterministic batches, logits only at the needed positions,
and no dropout unless requested."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from mixlora_exp.data.collator import pad_left
from mixlora_exp.evaluation.head import full_precision_head
from mixlora_exp.evaluation.packing import PackedQuestion, Request, pack, pad_packed
from mixlora_exp.evaluation.share import Result, Share

LOGIT_ROWS = 256
"""Number of positions whose logits over the vocabulary are in memory at once."""


class Keeper(Protocol):
    """Keeps what batches gave, by a name made of their items; see `runs.kept_batches`. `seconds`:
    what the batches took that were found."""

    seconds: float

    def next_call(self) -> int:
        """Return the number of a list of batches."""
        ...

    def name_of(self, call: int, number: int, keys: Sequence[str], lengths: Sequence[int]) -> str:
        """Return the name of a batch, the `number`-th of its list."""
        ...

    def has(self, name: str, size: int) -> bool:
        """Return whether results of a batch of `size` items are known, whose computing begins now
        if they are not."""
        ...

    def find(self, name: str) -> tuple[list[Any], dict[str, list[list[float]]]]:
        """Return the items' results of a known batch and, by group, its counts of experts."""
        ...

    def add(
        self, name: str, results: Sequence[Any], counts: Mapping[str, list[list[float]]]
    ) -> None:
        """Keep the items' results of a finished batch, and by group its counts of experts."""
        ...


def batches(lengths: Sequence[int], keys: Sequence[str], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, of similar length and at most `batch_tokens` padded tokens.

    The batches depend only on the set of (length, key) pairs, so results are bitwise independent of
    the order of the items. A row longer than `batch_tokens` forms its own batch.
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
    """Runs a model over rows of tokens and counts the experts that each group of rows uses.

    `groups` arguments name the group (task) of each row. With `dropout_seed` the adapter's dropout
    stays active, as in the official packages; torch's global generator is seeded with it. `share`:
    which of the batches this process computes; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        autocast: AbstractContextManager,
        batch_tokens: int,
        dropout_seed: int | None = None,
        share: Share | None = None,
    ) -> None:
        self.model = model.eval()
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
            # Only adapter layers: in training mode the whole model would compute the router loss.
            for module in model.modules():
                if hasattr(module, "lora_dropout"):
                    module.train()
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id
        self.autocast = autocast
        self.batch_tokens = batch_tokens
        self.device = next(model.parameters()).device
        self.share = share or Share()
        self.watch: Callable[[int, int], None] | None = None
        """Told after each batch how many items are done, and of how many."""
        self.kept: Keeper | None = None
        """Asked for the results of each batch before it is computed, and told them after."""
        self._counts: dict[str, Tensor] = {}

    @contextmanager
    def full_precision(self) -> Iterator[nn.Module]:
        """Within this context the output projection, which is yielded, computes in float32."""
        with self.autocast, full_precision_head(self.model) as head:
            yield head

    def logits(
        self, rows: Sequence[Sequence[int]], keep: int, groups: Sequence[str] | None = None
    ) -> Tensor:
        """Return logits of the last `keep` positions of each row, (rows, keep, vocabulary),
        float32."""
        found = self.run_logits(rows, keep)
        self._count([len(row) for row in rows], groups)
        return found

    def generate(self, rows: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedily decode at most `new_tokens` tokens after each row."""
        return self.run_generate(rows, new_tokens)

    # The forward passes, which `LockstepScorer` overrides to share them between adapters.

    @torch.no_grad()
    def run_logits(self, rows: Sequence[Sequence[int]], keep: int, **kwargs: Any) -> Tensor:
        """Return the logits of the last `keep` positions of each row, (rows, keep, vocabulary),
        float32. kwargs go to the model."""
        batch = {k: v.to(self.device) for k, v in pad_left(rows, self.pad_id).items()}
        with self.full_precision():
            length = batch["input_ids"].shape[1]
            # Column indices instead of a count, for the reason given in `Collator`.
            kept = torch.arange(length - keep, length, device=self.device)
            output = self.model(**batch, logits_to_keep=kept, use_cache=False, **kwargs)
        return output.logits[:, -keep:].float()

    @torch.no_grad()
    def run_generate(
        self, rows: Sequence[Sequence[int]], new_tokens: int, **kwargs: Any
    ) -> list[list[int]]:
        """Greedily decode at most `new_tokens` tokens after each row; returns the new tokens,
        padded to one length. kwargs go to the model."""
        batch = {k: v.to(self.device) for k, v in pad_left(rows, self.pad_id).items()}
        del batch["position_ids"]  # `generate` computes them from the mask.
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
        """Return per question and request the sum of the scored tokens' log-probabilities in nats,
        and whether all of them are the arg-max. A question's common prefix is computed once.

        `keys` order questions of equal length, so that results do not depend on the given order.
        """
        packed = [pack(requests) for requests in questions]

        def score(batch: list[int]) -> list[list[tuple[float, bool]]]:
            found = self.run_scores([packed[i] for i in batch])
            lengths = [len(packed[i].tokens) for i in batch]
            self._count(lengths, None if groups is None else [groups[i] for i in batch])
            return found

        return self.over_batches([len(p.tokens) for p in packed], keys, score)

    def over_batches(
        self,
        lengths: Sequence[int],
        keys: Sequence[str],
        work: Callable[[list[int]], Sequence[Result]],
    ) -> list[Result]:
        """Return the result of `work` for each item, called with the items' indices per batch (see
        `batches`); processes share the batches, and `watch` is told the progress of this one."""
        chosen = list(batches(lengths, keys, self.batch_tokens))
        own = sum(map(len, chosen[self.share.index :: self.share.count]))
        # An item's id and length may be another's too, its place in the list is not.
        numbers = {batch[0]: number for number, batch in enumerate(chosen)}
        done, call = 0, 0 if self.kept is None else self.kept.next_call()

        def watched(batch: list[int]) -> Sequence[Result]:
            nonlocal done
            if self.kept is None:
                found = work(batch)
            else:
                items = [keys[i] for i in batch], [lengths[i] for i in batch]
                name = self.kept.name_of(call, numbers[batch[0]], *items)
                found = self._recalled(self.kept, name, len(batch), lambda: work(batch))
            done += len(batch)
            if self.watch is not None:
                self.watch(done, own)
            return found

        return self.share.results(chosen, watched)

    def _recalled(
        self, kept: Keeper, name: str, size: int, work: Callable[[], Sequence[Result]]
    ) -> Sequence[Result]:
        """Return the results of a batch of `size` items from `kept`, or of `work`, which are kept
        then."""
        return self._known(kept, name) if kept.has(name, size) else self._new(kept, name, work)

    def _known(self, kept: Keeper, name: str) -> Sequence[Result]:
        results, counts = kept.find(name)
        for group, own in counts.items():
            added = torch.tensor(own, dtype=torch.float64, device=self.device)
            self._counts[group] = self._counts.get(group, 0) + added
        return results

    def _new(
        self, kept: Keeper, name: str, work: Callable[[], Sequence[Result]]
    ) -> Sequence[Result]:
        before = dict(self._counts)
        results = work()
        # `_count` makes a new tensor for the groups of a batch.
        own = {g: n for g, n in self._counts.items() if before.get(g) is not n}
        kept.add(name, results, {g: (n - before.get(g, 0)).tolist() for g, n in own.items()})
        return results

    @torch.no_grad()
    def run_scores(
        self, questions: Sequence[PackedQuestion], **kwargs: Any
    ) -> list[list[tuple[float, bool]]]:
        """Return per question and request the sum of the scored tokens' log-probabilities in nats,
        and whether greedy decoding would give these tokens. kwargs go to the model."""
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
            # The logits of all positions would not fit in memory; the model computes only one.
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
        """Return experts chosen in the last pass: per row and router a tensor (tokens, K) without
        padding, -1 for an empty slot. No routers without experts. lengths: tokens of each row."""
        routings = (getattr(module, "routing", None) for module in self.model.modules())
        return chosen([routing for routing in routings if routing is not None], lengths)

    def _experts(self) -> int:
        """Return the number of experts E in the last pass; 0 without experts."""
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
            # `bincount`, or a choice of those that are filled, would make a GPU wait for the host.
            numbers = torch.stack(layers) + 1
            counts = torch.zeros(len(layers), experts + 1, dtype=torch.float64, device=self.device)
            ones = torch.ones((), dtype=counts.dtype, device=self.device).expand_as(numbers)
            counts = counts.scatter_add_(1, numbers, ones)[:, 1:]
            self._counts[group] = self._counts.get(group, 0) + counts

    def take_expert_load(self, group: str = "") -> list[list[float]] | None:
        """Return (layers, E): share of the (token, slot) pairs per expert since the last call, of
        all processes, which must call this together; None without experts. A token in the common
        prefix of several options is counted once."""
        own = self._counts.pop(group, None)
        parts = self.share.gathered(None if own is None else own.cpu())
        counted = [part for part in parts if part is not None]
        if not counted:
            return None
        # Whole numbers in float64, so that their sum is exact.
        counts = torch.stack(counted).sum(dim=0)
        # Where no row has an expert, all are 0.
        return (counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)).tolist()


def chosen(routings: Sequence[Any], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Return experts of each row and router, (tokens, K) with the largest K of all, -1 for an empty
    slot; rows are padded on the left and have these lengths."""
    slots = max((routing.experts.shape[-1] for routing in routings), default=0)
    layers = []
    for routing in routings:
        experts = routing.experts.masked_fill(~routing.filled, -1)
        experts = functional.pad(experts, (0, slots - experts.shape[-1]), value=-1)
        layers.append(experts.view(len(lengths), -1, slots))
    return [
        [layer[row, layer.shape[1] - length :] for layer in layers]
        for row, length in enumerate(lengths)
    ]


def _likelihoods(
    head: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each token (N) given its hidden state (N, d), and whether it is
    the arg-max."""
    values, greedy = [], []
    for part, wanted in zip(hidden.split(LOGIT_ROWS), tokens.split(LOGIT_ROWS), strict=True):
        logits = head(part).float()
        ids = wanted.unsqueeze(-1)
        values.append(logits.gather(-1, ids).squeeze(-1) - logits.logsumexp(dim=-1))
        greedy.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(values), torch.cat(greedy)


def _total(scored: Sequence[tuple[float, bool]]) -> tuple[float, bool]:
    return sum(value for value, _ in scored), all(best for _, best in scored)
