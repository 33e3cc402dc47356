"""Times and saved bytes of one model on one batch."""

from __future__ import annotations

import time
from itertools import count

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from mixlora_exp.adapters.cache_source import adapters_changed
from mixlora_exp.adapters.weight_cache import cached_storages
from mixlora_exp.bench.batch import StepBatch
from mixlora_exp.bench.model import base_of
from mixlora_exp.bench.row_registry import BenchRow
from mixlora_exp.config.choices import Head
from mixlora_exp.kernels import RowIds
from mixlora_exp.models.precision import autocast
from mixlora_exp.training.head import loss_from_hidden
from mixlora_exp.training.last_layer import last_layer_at_kept_rows
from mixlora_exp.training.saved_bytes import saved_bytes

_STEPS = count()
"""Optimizer steps of this process, by which masks of dropout differ."""


class Clock:
    """Elapsed seconds between marks: wall time on a CPU, events of the stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        """Set a mark; on a GPU the first one waits for all work before it."""
        if self._cuda:
            if not self._marks:
                # Work that was launched before is not part of what is measured.
                torch.cuda.synchronize()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Return the seconds between successive marks; waits for a GPU to reach the last."""
        marks = self._marks
        if not self._cuda:
            return [b - a for a, b in zip(marks, marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]


def name_rows(
    model: nn.Module, batch: StepBatch, kept: Tensor | None = None, step: int | None = None
) -> RowIds | None:
    """Begin an optimizer step of the model's dropout stream, if it has one; the step's rows. kept:
    the numbers of those that a layer may compute alone; step: its number, None for the next one."""
    stream = getattr(model, "dropout_stream", None)
    if stream is None:
        return None
    stream.begin(next(_STEPS) if step is None else step, batch.example, batch.position, kept)
    return stream.rows


def loss_of(model: nn.Module, row: BenchRow, batch: StepBatch) -> Tensor:
    """Return the loss of a training step as transformers' Trainer has it computed: the forward pass
    under autocast in bf16 and what comes of it in float32, unless `row.autocast` is false. Rows of
    dropout are those that were named last."""
    given = batch.given_to(all_logits=row.all_logits)
    if row.method in ("base", "floor"):
        embedded = model.get_input_embeddings()(given.pop("input_ids")).detach()
        given["inputs_embeds"] = embedded.requires_grad_(row.method == "floor")
    dtype = batch.dtype if row.autocast else torch.float32
    with (
        autocast(batch.ids.device, dtype),
        loss_from_hidden(base_of(model), Head(row.head)),
    ):
        output = model(**given)
    return (convert_to_fp32(output) if row.autocast else output)["loss"]


def step_loss(model: nn.Module, row: BenchRow, batch: StepBatch, step: int | None = None) -> Tensor:
    """Return `loss_of` after naming the rows of an optimizer step, None for the next one."""
    if row.compiled or not hasattr(model, "dropout_stream"):
        # Compiled, each number of kept rows would be another code.
        name_rows(model, batch, step=step)
        return loss_of(model, row, batch)
    with last_layer_at_kept_rows(base_of(model)) as kept:
        columns = None if row.all_logits else batch.inputs.get("logits_to_keep")
        name_rows(model, batch, kept.use(batch.ids.shape, columns), step)
        return loss_of(model, row, batch)


def training_step(model: nn.Module, row: BenchRow, batch: StepBatch) -> tuple[float, float]:
    """Return seconds of forward pass with loss, and of the backward pass.

    Each step counts as an optimizer step: what follows from the adapters' weights, DoRA's norms
    say, is computed anew in each, and its time is part of the forward pass.
    """
    model.train()
    clock = Clock(batch.ids.device)
    clock.mark()
    adapters_changed()
    loss = step_loss(model, row, batch)
    clock.mark()
    if row.method != "base":
        loss.backward()
    clock.mark()
    spans = clock.spans()
    model.zero_grad(set_to_none=True)
    return spans[0], spans[1]


@torch.no_grad()
def inference_step(model: nn.Module, row: BenchRow, batch: StepBatch) -> float:
    """Return seconds of a forward pass over the whole batch with the logits of the last position.
    What is computed once for many passes, the norms of DoRA, is computed before.

    The position is given as an index: of `logits_to_keep=1` comes a view with gaps, for which torch
    multiplies each row by a copy of the head's weight of its own (four times the time of all else
    for 8 rows of LLaMA's shape on a CPU).
    """
    model.eval()
    ids = batch.ids
    with autocast(ids.device, batch.dtype if row.autocast else torch.float32):
        model(input_ids=ids[:1, :1])
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        clock = Clock(ids.device)
        clock.mark()
        model(input_ids=ids, logits_to_keep=last)
        clock.mark()
    return clock.spans()[0]


def feed_forward_saved_bytes(model: nn.Module, row: BenchRow, batch: StepBatch) -> float:
    """Return bytes per token that the first feed-forward block keeps for its backward pass, its
    input included. A figure that does not depend on the machine."""
    model.train()
    base, tokens = base_of(model), min(batch.ids.numel(), 1024)
    block = base.model.layers[0].mlp
    owned = {p.untyped_storage().data_ptr() for p in block.parameters()}
    x = torch.randn(1, tokens, base.config.hidden_size, device=batch.ids.device)
    x = x.to(batch.dtype).requires_grad_()
    rows = torch.arange(tokens, device=x.device)
    stream = getattr(model, "dropout_stream", None)
    if stream is not None:
        stream.begin(0, torch.zeros_like(rows), rows)

    def run() -> Tensor:
        with autocast(x.device, batch.dtype if row.autocast else torch.float32):
            return block(x)

    # Copies of the weights stay from pass to pass, those of all layers in the same memory.
    run()
    return saved_bytes(run, owned | cached_storages(block)) / tokens
