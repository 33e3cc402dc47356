"""What several adapters on one base cost: time per token, and memory item by item."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from mixlora_exp.bench.measure import inference_step, training_step
from mixlora_exp.bench.model import adapted, base_model, model_config
from mixlora_exp.bench.settings import Row
from mixlora_exp.bench.several_memory import account, resident
from mixlora_exp.bench.several_steps import KINDS, Joint, SeveralConfig, check, kind_of

__all__ = ["SeveralConfig", "benchmark_several"]


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def benchmark_several(
    config: SeveralConfig, *, say: Callable[[str], None] = _say
) -> dict[str, Any]:
    """Measure M adapters for each M of `counts`.

    `times`: microseconds per token of a step with equal tokens in all, `alone` being the ordinary
    path of one adapter, and of `small` batches, all adapters together against one after another;
    medians and quartiles over rounds in which all rows are interleaved. `memory`: see `account`.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), device, config.seed)
    base.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    steps = _steps(config, base)
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for number in range(config.rounds + 1):
        names = list(steps)
        random.Random(config.seed + number).shuffle(names)
        for name in names:
            taken = steps[name]()
            if number:  # The first round warms up.
                samples[name].append(taken)
        say(f"round {number}/{config.rounds}")
    tokens = config.sequences * config.length
    times = {name: _times(taken, samples, name, config) for name, taken in samples.items()}
    steps.clear()
    del base
    say("memory, by accounting")
    memory = account(config)
    held = {}
    if config.resident and device == "cpu":
        for count in config.counts:
            held[str(count)] = resident(config, count)
            say(f"resident memory of {count}")
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


def _steps(config: SeveralConfig, base: torch.nn.Module) -> dict[str, Callable[[], tuple]]:
    """By name, a function that returns seconds of forward, backward and inference."""
    vocabulary, device = base.config.vocab_size, next(base.parameters()).device
    steps: dict[str, Callable[[], tuple]] = {}

    def alone(sequences: int, kind: str) -> Callable[[], tuple]:
        row = Row(method=kind, kernel="auto")
        model = adapted(base, row, config.dropout, config.seed)
        ids = torch.randint(vocabulary, (sequences, config.length), device=device)
        return lambda: (*training_step(model, row, ids), inference_step(model, ids))

    def joined(count: int, sequences: int) -> Callable[[], tuple]:
        joint = Joint(config, base, count, sequences)
        return lambda: (*joint.train(), joint.infer())

    steps["alone"] = alone(config.sequences, kind_of(config, 0))
    for count in config.counts:
        steps[f"together_{count}"] = joined(count, config.sequences // count)
    for count in config.counts[1:]:
        steps[f"small_together_{count}"] = joined(count, config.small)
        singles = [alone(config.small, kind_of(config, i)) for i in range(min(count, len(KINDS)))]

        def one_after_another(singles=singles, count=count) -> tuple:
            taken = [singles[i % len(singles)]() for i in range(count)]
            return tuple(map(sum, zip(*taken, strict=True)))

        steps[f"small_alone_{count}"] = one_after_another
    return steps


def _times(
    taken: Sequence[tuple[float, ...]], samples: dict[str, list], name: str, config: SeveralConfig
) -> dict[str, Any]:
    """Medians, and ratios within rounds: to the first row of the same tokens, or of small batches
    to the runs one after another."""
    small = name.startswith("small")
    count = int(name.rpartition("_")[2]) if small else 0
    tokens = config.length * (config.small * count if small else config.sequences)
    found: dict[str, Any] = {}
    parts = {"train": slice(0, 2), "infer": slice(2, 3)}
    other = samples[f"small_alone_{count}" if small else "together_1"]
    for part, span in parts.items():
        own = [sum(sample[span]) for sample in taken]
        found[f"{part}_us_per_token"] = round(statistics.median(own) * 1e6 / tokens, 3)
        ratios = [a / sum(b[span]) for a, b in zip(own, other, strict=True)]
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        found[f"{part}_ratio"] = round(middle, 4)
        found[f"{part}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    return found
