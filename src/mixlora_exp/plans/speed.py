"""Tokens per second of a run on this machine, from the committed benchmark records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mixlora_exp.config.choices import Compile, LossOn, Quantization
from mixlora_exp.config.paths import ROOT
from mixlora_exp.config.schema import (
    ATTENTION_TARGETS,
    FEED_FORWARD_TARGETS,
    Config,
    LoraMethodConfig,
    MixLoraMethodConfig,
    ModelConfig,
)
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.kernels import MIXTURES, resolve_kernel
from mixlora_exp.models.parameters import routers_of, skeleton_of
from mixlora_exp.system.untrusted import read_json

BENCHMARKS = ROOT / "results" / "bench"
WHERE = {LossOn.all: "all tokens", LossOn.answer: "answers alone"}


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second in training and in scoring, and where they come from."""

    training: float
    scoring: float
    source: str


def measured_rows(
    folder: Path = BENCHMARKS,
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """Yield (file's name, hardware, benchmark, row) of each row in the records of training steps of
    a folder."""
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        hardware = record.get("provenance", {}).get("hardware", {})
        for benchmark in record.get("benchmarks", [record]):
            rows = benchmark.get("rows")
            if not isinstance(rows, dict) or "batch" not in benchmark.get("config", {}):
                continue
            for row in rows.values():
                if "method" in row and "kernel" in row:
                    yield path.name, hardware, benchmark, row


def recorded_speed(
    config: Config, hardware: Mapping[str, Any], dtype: str, folder: Path = BENCHMARKS
) -> Speed | None:
    """Return the speed by the records in a folder of this model at full depth with this method and
    kernel, on the same GPU or, without one, the same CPU with as many threads; None without one.
    Records with the loss on the same tokens come first, then those of steps under autocast, as
    training runs, then those of more rounds. A loss on other tokens is named with the source.

    hardware: as in a record. dtype: of the frozen weights on this machine.
    """
    found: list[tuple[tuple[bool, bool, int], Speed]] = []
    for file, where, benchmark, row in measured_rows(folder):
        settings = benchmark["config"]
        here = _machine(where) == _machine(hardware) and settings["dtype"] == dtype
        if not here or not _is_of(config, benchmark, row, bool(hardware.get("gpus"))):
            continue
        names = ("train_forward", "train_backward", "infer_forward")
        forward, backward, scored = (row.get(f"{name}_us_per_token") for name in names)
        if None not in (forward, backward, scored):
            # Records from before the setting have the loss on all tokens.
            loss_on = settings.get("loss_on", LossOn.all.value)
            same = loss_on == config.trainer.loss_on.value
            source = f"results/bench/{file}"
            if not same:
                source += f", whose loss is on {WHERE[LossOn(loss_on)]}"
            under_autocast = "loss_on" in settings and row.get("autocast", True)
            speed = Speed(1e6 / (forward + backward), 1e6 / scored, source)
            found.append(((same, under_autocast, row.get("rounds", 0)), speed))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _machine(hardware: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the key of a speed: the first GPU, or the CPU and its threads."""
    gpus = hardware.get("gpus")
    return (gpus[0],) if gpus else (hardware.get("cpu"), hardware.get("cpu_threads"))


def _is_of(config: Config, benchmark: Mapping[str, Any], row: Mapping[str, Any], gpu: bool) -> bool:
    """Return whether a row is of a configuration's model, method and kernel, trained plainly."""
    model, method, trainer = config.model, config.method, config.trainer
    kernel = resolve_kernel(config.kernel.name.value, "cuda" if gpu else "cpu")
    return (
        benchmark["config"]["model"] == model.name
        and benchmark["layers"] == skeleton_of(model).config.num_hidden_layers
        and model.quantization is Quantization.none
        and trainer.compile is Compile.off
        and not trainer.gradient_checkpointing
        and row.get("adapter_dtype", "float32") == "float32"
        and not row.get("compiled")  # A record of before names it so.
        and row.get("compile", "off") == "off"
        and row["method"] == method.name
        and row["kernel"] == kernel
        and isinstance(method, LoraMethodConfig)
        and bool(benchmark["config"]["dropout"]) == bool(method.dropout)
        and _adapter(row) == _adapter_of(model, method)
        and {*method.targets} == {*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS}
        and method.layers_to_transform is None
        and not method.rank_pattern
    )


def _adapter(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the rank of a row's adapter, and of several experts their number, K and router."""
    name = row["method"]
    mixed = name.startswith("mix") or (name in MIXTURES and MIXTURES[name].router is not None)
    rank = row.get("rank", 16 if mixed else 80)
    if not mixed:
        return (rank,)
    return rank, row["num_experts"], row["top_k"], row.get("router", "top_k")


def _adapter_of(model: ModelConfig, method: LoraMethodConfig) -> tuple[Any, ...]:
    """Return `_adapter` of a method; no row's if its blocks differ."""
    if isinstance(method, MixLoraMethodConfig):
        ranks = {method.rank, method.rank_of_experts}
        routers = routers_of(model, method).values()
        sizes = {(router.num_experts, router.slots) for router in routers}
        return *ranks, *chain(*sizes), method.router.value
    if isinstance(method, LinearMixtureMethodConfig):
        own = MIXTURES[method.mixture.value].router
        if own is not None:
            router = method.router_name(own)
            return method.rank_of_experts, method.num_experts, method.top_k, router
    return (method.rank,)


def duration(seconds: float) -> str:
    """Return seconds as text in s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_line(speed: Speed | None, training: float, scoring: float, processes: int = 1) -> str:
    """Return the line of a plan about time: training and scoring tokens, which the processes share,
    at a speed."""
    if speed is None:
        return "not known (plan.probe=true measures)"
    parts = {"training": training / speed.training, "scoring": scoring / speed.scoring}
    spans = {name: seconds / processes for name, seconds in parts.items() if seconds}
    each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spans.items())
    rates = f"{speed.training:,.0f} and {speed.scoring:,.0f} tokens/s"
    return f"about {duration(sum(spans.values()))} here: {each} ({rates} by {speed.source})"
