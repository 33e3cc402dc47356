"""Plans of steps beside peaks that were measured on GPUs, in the committed benchmark records."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mixlora_exp.config.command import compose
from mixlora_exp.config.schema import Config
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.plans.memory import memory_of
from mixlora_exp.plans.speed import measured_rows

FLOORS = ("base", "floor")


@dataclass(frozen=True, slots=True)
class MeasuredPeak:
    """The peak in a record's row, in bytes, of a step without an optimizer, and the overrides of a
    run whose step it is."""

    file: str
    gpu: str
    words: tuple[str, ...]
    autocast: bool
    measured: int

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return _composed(self.words)

    @property
    def planned(self) -> int:
        """The bytes by the plan, without those of the optimizer."""
        return _planned(self.words, self.autocast)


# Composing takes longer than planning, and records of several cards have the same rows.
@functools.cache
def _composed(words: tuple[str, ...]) -> Config:
    return compose(words)


@functools.cache
def _planned(words: tuple[str, ...], autocast: bool) -> int:
    config = _composed(words)
    moments = 8 * count_parameters(config.model, config.method).trainable
    return sum(memory_of(config, autocast=autocast).values()) - moments


def _words(benchmark: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    settings, mixed = benchmark["config"], row["method"].startswith("mix")
    head = row["head"] if row["head"] in ("full", "chunked") else "chunked"
    words = [
        f"model={settings['model']}", "model.weights=random", "trainer.precision=bfloat16",
        f"method={row['method']}", f"method.dropout={settings['dropout']}",
        f"kernel={row['kernel']}", f"trainer.head={head}",
        f"trainer.loss_on={settings.get('loss_on', 'all')}",
        f"data.cutoff_length={settings['length']}",
        f"trainer.batch_size={settings['batch']}", f"trainer.micro_batch_size={settings['batch']}",
    ]  # fmt: skip
    if mixed:
        words += [f"method.num_experts={row['num_experts']}", f"method.top_k={row['top_k']}"]
    return tuple(words)


def measured_peaks() -> Iterator[MeasuredPeak]:
    """Yield each row that a plan can be held against. Of records that tell of no `loss_on`, made
    before the kernels of today, those are the rows of PEFT's own layers and of the paper's form:
    their code did not change."""
    for file, hardware, benchmark, row in measured_rows():
        comparable = (
            hardware["gpus"]
            and row.get("train_peak_memory_bytes")
            and row["method"] not in FLOORS
            and row.get("adapter_dtype", "float32") == "float32"
            and not row.get("all_logits")
            and not row.get("compiled")
            and row.get("compile", "off") == "off"
            and ("loss_on" in benchmark["config"] or row["kernel"] == "peft")
        )
        if comparable:
            yield MeasuredPeak(
                file,
                hardware["gpus"][0],
                _words(benchmark, row),
                bool(row.get("autocast")),
                row["train_peak_memory_bytes"],
            )
