"""`kind=bytes`: the memory of a training step of each method, counted and not measured: the bytes
that autograd keeps for the backward pass, and the most that live at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mixlora_exp.adapters.cache_source import adapters_changed
from mixlora_exp.adapters.weight_cache import cached_storages
from mixlora_exp.bench.batch import StepBatch, step_batch
from mixlora_exp.bench.live_bytes import LiveBytes
from mixlora_exp.bench.measure import feed_forward_saved_bytes, step_loss, training_step
from mixlora_exp.bench.model import base_model, model_config, model_of
from mixlora_exp.bench.options import BenchOptions, as_json, require_dtype, require_positive
from mixlora_exp.bench.row_registry import BASELINE, ROWS, BenchRow
from mixlora_exp.bench.runner import Kind, echo
from mixlora_exp.config.choices import PAPER_METHODS, LossOn
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import KERNELS
from mixlora_exp.training.saved_bytes import saved_bytes, storages_of


@dataclass(slots=True, kw_only=True)
class BytesOptions(BenchOptions):
    """A step of each row, on a CPU; the settings are those of `kind=steps`."""

    model: str = "smollm2_135m"
    layers: int | None = None
    batch: int = 8
    length: int = 128
    loss_on: LossOn = LossOn.answer
    answer: int = 8
    dtype: str = "bfloat16"
    dropout: float = 0.05
    rows: list[str] = field(default_factory=lambda: [BASELINE, "dora_peft", *PAPER_METHODS])
    seed: int = 0


def _check(options: BytesOptions) -> None:
    """Check the settings.

    Raises:
        UserError: a value is out of range, or a row is not counted here.
    """
    require_positive(options, "batch", "length", "answer")
    require_dtype(options.dtype)
    if not 0 <= options.dropout < 1:
        raise UserError(f"dropout={options.dropout} must be in [0, 1)")
    for name in options.rows:
        row = ROWS.get(name)
        if row is None or row.compiled or KERNELS[row.kernel].device == "cuda":
            raise UserError(f"rows={name} is not valid: choose rows that run eagerly on a CPU")


def _bytes_of(model: nn.Module, row: BenchRow, batch: StepBatch) -> dict[str, float]:
    """Return bytes beyond parameters and batch: `held_bytes`, what the first step makes and later
    ones have; `kept_bytes`, what the forward pass keeps for the backward pass; `peak_bytes`, the
    most that live at once in a step, what is held and gradients included."""
    with LiveBytes() as first:
        training_step(model, row, batch)
    gc.collect()
    owned = storages_of(model) | cached_storages(model)
    kept = saved_bytes(lambda: step_loss(model, row, batch, step=0), owned)
    adapters_changed()
    with LiveBytes() as memory:
        step_loss(model, row, batch, step=0).backward()
    model.zero_grad(set_to_none=True)
    block = feed_forward_saved_bytes(model, row, batch)
    return {
        "held_bytes": first.live,
        "kept_bytes": kept,
        "peak_bytes": first.live + memory.peak,
        "feed_forward_kept_bytes_per_token": round(block, 1),
    }


def measure(options: BytesOptions) -> Iterator[dict[str, Any]]:
    """Yield the record after each row; the one that others are compared with comes first."""
    _check(options)
    shape, dtype = model_config(options.model, options.layers), getattr(torch, options.dtype)
    base = base_model(shape, dtype, "cpu", options.seed)
    batch = step_batch(
        vocabulary=shape.config["vocab_size"],
        batch=options.batch,
        length=options.length,
        loss_on=options.loss_on,
        answer=options.answer,
        dtype=dtype,
        device="cpu",
        seed=options.seed,
    )
    rows: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([BASELINE, *options.rows]):
        model = model_of(name, base, options.dropout, options.seed)
        rows[name] = _bytes_of(model, ROWS[name], batch)
        del model
        gc.collect()
        echo(f"{name}: {rows[name]}")
        yield {
            "config": as_json(options),
            "layers": shape.config["num_hidden_layers"],
            "tokens": batch.ids.numel(),
            "rows": dict(rows),
        }


def _name(record: Mapping[str, Any]) -> str:
    config = record["config"]
    shape = f"{record['layers']}layers-{config['batch']}x{config['length']}"
    return f"bytes-{config['model']}-{shape}-{config['dtype']}-loss_on_{config['loss_on']}"


def _markdown(record: Mapping[str, Any]) -> str:
    config, rows, tokens = record["config"], record["rows"], record["tokens"]
    where = "all tokens"
    if config["loss_on"] == "answer":
        where = f"the last {config['answer']} tokens of each sequence"
    lines = [
        f"# Bytes of a step: {config['model']}, {record['layers']} layers, {config['batch']} x "
        f"{config['length']} tokens, {config['dtype']}, dropout {config['dropout']}",
        "",
        f"Random weights, loss on {where}; torch {record['provenance']['packages']['torch']}. "
        "Bytes of tensors on a CPU beyond parameters and batch, counted: no machine's speed or "
        "allocator is part of them. Ratios to `lora_peft` in brackets.",
        "",
        "| row | kept for the backward pass, bytes a token | most at once, bytes a token | of "
        "these held from step to step | kept by a feed-forward block, bytes a token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        cells = [name]
        for key in ("kept_bytes", "peak_bytes"):
            ratio = row[key] / rows[BASELINE][key]
            cells.append(f"{row[key] / tokens:,.0f} ({ratio:.2f})")
        cells.append(f"{row['held_bytes'] / tokens:,.0f}")
        cells.append(f"{row['feed_forward_kept_bytes_per_token']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


KIND = Kind(options=BytesOptions, measure=measure, name=_name, markdown=_markdown)
