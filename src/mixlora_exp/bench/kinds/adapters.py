"""`kind=adapters`: what several adapters on one base cost, in time per token and memory by item."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from mixlora_exp.bench.batch import step_batch
from mixlora_exp.bench.interleaved import Sample, interleaved, quartiles, ratios
from mixlora_exp.bench.measure import inference_step, training_step
from mixlora_exp.bench.model import adapted, base_model, model_config
from mixlora_exp.bench.row_registry import BenchRow
from mixlora_exp.bench.runner import Kind, echo
from mixlora_exp.bench.several_memory import account, resident
from mixlora_exp.bench.several_report import several_markdown
from mixlora_exp.bench.several_steps import METHODS, AdapterOptions, Joint, check, method_of
from mixlora_exp.config.choices import LossOn


def benchmark_several(
    config: AdapterOptions, *, echo: Callable[[str], None] = echo
) -> dict[str, Any]:
    """Measure M adapters for each M of `counts`.

    `times`: microseconds per token of a step with equal tokens in all, `alone` being the ordinary
    path of one adapter, and of `small` batches, all adapters together against one after another;
    medians and quartiles over rounds in which all rows are interleaved. `memory`: see `account`.
    """
    check(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), device, config.seed)
    base.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    steps = _steps(config, base)
    for step in steps.values():
        step(0)  # Warms up.
    samples = interleaved(steps, config.rounds, config.seed, echo=echo)
    tokens = config.sequences * config.length
    times = {name: _times(taken, samples, name, config) for name, taken in samples.items()}
    steps.clear()
    del base
    echo("memory, by accounting")
    memory = account(config)
    held = {}
    if config.resident and device == "cpu":
        for count in config.counts:
            held[str(count)] = resident(config, count)
            echo(f"resident memory of {count}")
    return {
        "config": asdict(config),
        "device": device,
        "threads": torch.get_num_threads(),
        "layers": shape.config["num_hidden_layers"],
        "tokens": tokens,
        "times": times,
        "memory": memory,
        "resident": held,
    }


def _sample(forward: float, backward: float, inference: float) -> Sample:
    return {
        "train_forward_s": forward, "train_backward_s": backward, "infer_forward_s": inference,
    }  # fmt: skip


def _steps(config: AdapterOptions, base: torch.nn.Module) -> dict[str, Callable[[int], Sample]]:
    steps: dict[str, Callable[[int], Sample]] = {}

    def alone(sequences: int, method: str) -> Callable[[int], Sample]:
        row = BenchRow(method=method, kernel="auto", head="full")
        model = adapted(base, row, config.dropout, config.seed)
        batch = step_batch(
            vocabulary=base.config.vocab_size,
            batch=sequences,
            length=config.length,
            loss_on=LossOn.all,
            dtype=base.dtype,
            device=base.device.type,
            seed=config.seed,
        )
        return lambda number: _sample(
            *training_step(model, row, batch), inference_step(model, row, batch)
        )

    def joined(count: int, sequences: int) -> Callable[[int], Sample]:
        joint = Joint(config, base, count, sequences)
        return lambda number: _sample(*joint.train(), joint.infer())

    steps["alone"] = alone(config.sequences, method_of(config, 0))
    for count in config.counts:
        steps[f"together_{count}"] = joined(count, config.sequences // count)
    for count in config.counts[1:]:
        steps[f"small_together_{count}"] = joined(count, config.small)
        singles = [
            alone(config.small, method_of(config, i)) for i in range(min(count, len(METHODS)))
        ]

        def one_after_another(number: int, singles=singles, count=count) -> Sample:
            taken = [singles[i % len(singles)](number) for i in range(count)]
            return {part: sum(sample[part] for sample in taken) for part in taken[0]}

        steps[f"small_alone_{count}"] = one_after_another
    return steps


PARTS = {"train": ("train_forward_s", "train_backward_s"), "infer": ("infer_forward_s",)}


def _times(
    taken: Sequence[Sample], samples: Mapping[str, Sequence[Sample]], name: str,
    config: AdapterOptions,
) -> dict[str, Any]:  # fmt: skip
    """Return medians, and ratios within rounds: to the first row of the same tokens, or of small
    batches to the runs one after another."""
    small = name.startswith("small")
    count = int(name.rpartition("_")[2]) if small else 0
    tokens = config.length * (config.small * count if small else config.sequences)
    found: dict[str, Any] = {}
    other = samples[f"small_alone_{count}" if small else "together_1"]
    for part, keys in PARTS.items():
        middle = statistics.median(sum(sample[key] for key in keys) for sample in taken)
        found[f"{part}_us_per_token"] = round(middle * 1e6 / tokens, 3)
        low, middle, high = quartiles(ratios(taken, other, keys))
        found[f"{part}_ratio"] = round(middle, 4)
        found[f"{part}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    return found


def _name(record: Mapping[str, Any]) -> str:
    config = record["config"]
    parts = ["adapters", record["device"], config["model"], config["method"]]
    shape = f"{config['sequences']}x{config['length']}"
    return "-".join([*parts, f"{record['layers']}layers", shape, config["dtype"]])


def measure(config: AdapterOptions) -> Iterator[dict[str, Any]]:
    """Yield the record of one benchmark of several adapters."""
    yield benchmark_several(config)


KIND = Kind(options=AdapterOptions, measure=measure, name=_name, markdown=several_markdown)
