"""Steps of several adapters on one base of random weights, to be measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.cache_source import adapters_changed
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.adapters.mixed_adapters import add_guest, parameters_of
from mixlora_exp.bench.measure import Clock
from mixlora_exp.bench.model import peft_config, sharing
from mixlora_exp.bench.options import BenchOptions, require_positive
from mixlora_exp.bench.row_registry import METHODS, BenchRow
from mixlora_exp.config.choices import Head
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.models.precision import autocast
from mixlora_exp.training.losses import joint_losses, total_of
from mixlora_exp.training.packed import packed_attention
from mixlora_exp.training.saved_bytes import saved_bytes


@dataclass(slots=True, kw_only=True)
class AdapterOptions(BenchOptions):
    """One benchmark of several adapters. `method`: one, or `mixed` for all four in turn.
    `sequences` of `length` tokens go through the model in a step, shared out over the adapters
    (`small`: each adapter has this many sequences of its own instead, against runs one after
    another). `layers` cuts the depth of what is timed."""

    model: str = "smollm2_135m"
    method: str = "mixlora"
    layers: int | None = None
    counts: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    sequences: int = 8
    length: int = 128
    small: int = 1
    dtype: str = "bfloat16"
    dropout: float = 0.05
    rounds: int = 8
    resident: bool = True
    seed: int = 0


def check(config: AdapterOptions) -> None:
    """Check the settings.

    Raises:
        UserError: a value is out of range.
    """
    if config.method not in (*METHODS, "mixed"):
        raise UserError(
            f"method={config.method} is unknown: choose from {', '.join(METHODS)}, mixed"
        )
    require_positive(config, "sequences", "length", "small", "rounds")
    for count in config.counts:
        if count < 1 or config.sequences % count:
            raise UserError(
                f"counts={count} must divide sequences={config.sequences}, so that all adapters "
                "get the same"
            )
    if not config.counts or config.counts[0] != 1:
        raise UserError(f"counts={config.counts} must begin with 1, which the others stand beside")


def method_of(config: AdapterOptions, number: int) -> str:
    """Return the method of the adapter with this number."""
    return METHODS[number % len(METHODS)] if config.method == "mixed" else config.method


def together(config: AdapterOptions, base: torch.nn.Module, count: int) -> PeftModel:
    """Return `count` trainable adapters on the weights of `base`, B not left at zero."""
    model: Any = sharing(base)
    for number in range(count):
        torch.manual_seed(config.seed + number)
        row = BenchRow(method=method_of(config, number))
        model = add_guest(model, f"adapter{number}", peft_config(row, config.dropout))
    set_kernel(model, "auto")
    names = [f"adapter{number}" for number in range(count)]
    model.dropout_streams = {
        name: DropoutStream(config.seed + number) for number, name in enumerate(names)
    }
    for name, stream in model.dropout_streams.items():
        use_dropout_stream(model, name, stream)
    with torch.no_grad():
        for number in range(count):
            for name, parameter in parameters_of(model, f"adapter{number}").items():
                parameter.requires_grad_(True)
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
    return model


def batches_of(config: AdapterOptions, count: int, sequences: int, vocabulary: int) -> dict:
    """Return random sequences for each adapter, every token of which counts."""
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(config.seed + number)
        ids = torch.randint(vocabulary, (sequences, config.length), generator=generator)
        made[f"adapter{number}"] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(config.length).expand(sequences, -1),
            "labels": ids,
        }
    return made


class Joint:
    """Steps of several adapters, on batches of their own."""

    def __init__(self, config: AdapterOptions, base: torch.nn.Module, count: int, sequences: int):
        self.model = together(config, base, count)
        device = next(self.model.parameters()).device
        vocabulary = base.config.vocab_size
        self.batches = {
            name: {key: value.to(device) for key, value in batch.items()}
            for name, batch in batches_of(config, count, sequences, vocabulary).items()
        }
        self.items = {name: batch["labels"].numel() for name, batch in self.batches.items()}
        self.device, self.dtype = device, getattr(torch, config.dtype)
        self.steps = 0

    def loss(self, attention: str) -> Tensor:
        """Return the sum of the adapters' losses on their batches, a scalar with its graph; counts
        as an optimizer step."""
        self.steps += 1
        for name, batch in self.batches.items():
            rows = torch.arange(len(batch["input_ids"]), device=self.device)
            example = rows.repeat_interleave(batch["input_ids"].shape[1])
            position = batch["position_ids"].flatten()
            self.model.dropout_streams[name].begin(self.steps, example, position)
        with autocast(self.device, self.dtype):
            losses = joint_losses(self.model, self.batches, self.items, Head.full, attention)
        return total_of(losses)

    def train(self) -> tuple[float, float]:
        """Run a forward and a backward pass in training mode; returns the seconds of each."""
        self.model.train()
        adapters_changed()
        clock = Clock(self.device)
        with packed_attention(self.model.base_model.model) as attention:
            clock.mark()
            loss = self.loss(attention)
            clock.mark()
            loss.backward()
            clock.mark()
        self.model.base_model.row_map.use()
        self.model.zero_grad(set_to_none=True)
        return tuple(clock.spans())

    @torch.no_grad()
    def infer(self) -> float:
        """Run a forward pass for the last position's logits, each row with the adapter it names;
        returns its seconds."""
        self.model.eval()
        ids = torch.cat([batch["input_ids"] for batch in self.batches.values()])
        names = [name for name, batch in self.batches.items() for _ in batch["input_ids"]]
        each = list(self.batches)
        with autocast(self.device, self.dtype):
            self.model(input_ids=ids[: len(each), :1], adapter_names=each)
        # As an index, for the reason that `bench.measure.inference_step` gives.
        last = torch.tensor([ids.shape[1] - 1], device=self.device)
        clock = Clock(self.device)
        clock.mark()
        with autocast(self.device, self.dtype):
            self.model(input_ids=ids, adapter_names=names, logits_to_keep=last)
        clock.mark()
        return clock.spans()[0]

    def saved(self) -> int:
        """Return bytes kept for the backward pass, beside parameters."""
        self.model.train()
        owned = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        with packed_attention(self.model.base_model.model) as attention:
            found = saved_bytes(lambda: self.loss(attention), owned)
        self.model.base_model.row_map.use()
        return found
