"""Times and saved bytes of one model on one batch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixlora_exp.adapters.norms import adapters_changed
from mixlora_exp.bench.rows import BenchRow
from mixlora_exp.config.choices import Head
from mixlora_exp.training.head import loss_from_hidden


class Clock:
    """Elapsed seconds between marks: wall time on a CPU, events of the stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        marks = self._marks
        if not self._cuda:
            return [b - a for a, b in zip(marks, marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]


def _base(model: nn.Module) -> nn.Module:
    return model.base_model.model if hasattr(model, "peft_config") else model


def training_step(model: nn.Module, row: BenchRow, ids: Tensor) -> tuple[float, float]:
    """Seconds of forward pass with loss, and of the backward pass. ids: (batch, length).

    Each step counts as an optimizer step, so DoRA's norms are computed anew in each.
    """
    model.train()
    adapters_changed()
    clock = Clock(ids.device)
    if row.method in ("base", "floor"):
        embedded = model.get_input_embeddings()(ids).detach()
        embedded.requires_grad_(row.method == "floor")
        inputs = {"inputs_embeds": embedded}
    else:
        inputs = {"input_ids": ids}
    with loss_from_hidden(_base(model), Head(row.head)):
        clock.mark()
        loss = model(**inputs, labels=ids).loss
        clock.mark()
    if row.method != "base":
        loss.backward()
    clock.mark()
    spans = clock.spans()
    model.zero_grad(set_to_none=True)
    return spans[0], spans[1]


@torch.no_grad()
def inference_step(model: nn.Module, ids: Tensor) -> float:
    """Seconds of a forward pass over the whole batch with the logits of the last position. What is
    computed once for many passes, the norms of DoRA, is computed before.

    The position is given as an index: of `logits_to_keep=1` comes a view with gaps, for which torch
    multiplies each row by a copy of the head's weight of its own (four times the time of all else
    for 8 rows of LLaMA's shape on a CPU).
    """
    model.eval()
    model(input_ids=ids[:1, :1])
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    clock = Clock(ids.device)
    clock.mark()
    model(input_ids=ids, logits_to_keep=last)
    clock.mark()
    return clock.spans()[0]


def saved_bytes(run: Callable[[], Tensor], owned: set[int]) -> int:
    """Bytes that autograd keeps for the backward pass of `run()`, each storage once; `owned` are
    the data pointers of storages that exist anyway (parameters)."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        found = _Kept(tensor)
        kept.add(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        result = run()
        # Only now: what a part of the graph kept that is gone again does not count, and its memory
        # may have been given to others.
        storages = [found.tensor.untyped_storage() for found in kept]
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in owned}
        total = sum(sizes.values())
    del result
    return total


class _Kept:
    """A tensor that autograd keeps, for as long as it does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def feed_forward_saved_bytes(model: nn.Module, tokens: int) -> float:
    """Bytes per token that the first feed-forward block keeps for its backward pass, its input
    included. A figure that does not depend on the machine."""
    model.train()
    block = _base(model).model.layers[0].mlp
    weight = next(p for name, p in block.named_parameters() if name.endswith("weight"))
    owned = {p.untyped_storage().data_ptr() for p in block.parameters()}
    x = torch.randn(1, tokens, _base(model).config.hidden_size, device=weight.device)
    x = x.to(_base(model).dtype).requires_grad_()
    return saved_bytes(lambda: block(x), owned) / tokens
