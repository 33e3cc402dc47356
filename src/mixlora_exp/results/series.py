"""Data series of the figures, from tables and records, independent of drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.results.cells import Blocks, Standards, block_title, deviations
from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES, TASK_TITLES, read_paper
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.results.step_sizes import step_size
from mixlora_exp.results.tables.parts import AVERAGE, Entry, Table


@dataclass(frozen=True, slots=True)
class SweptLine:
    """Average accuracy over the values of one setting, for one method and source."""

    title: str
    label: str
    values: tuple[str, ...]
    cells: tuple[Entry, ...]
    from_paper: bool


def sweeps(table: Table, prefix: str) -> list[SweptLine]:
    """Return the lines of Table 8 or 9 that vary a setting (`prefix`: "r=" or "coef="), per
    block."""
    found: dict[tuple[str, ...], list[tuple[str, Entry]]] = {}
    for block in table.blocks:
        for row in block.rows:
            method, _, value = row.label[0].partition(" ")
            if row.label[2] not in ("paper", "ours") or not value.startswith(prefix):
                continue
            average = row.cells[block.columns.index(AVERAGE)]
            if average.value is not None:
                value, _, also = value.removeprefix(prefix).partition(" ")
                # Ranks with alpha = 2 r form a separate line.
                also = " (alpha = 2 r)" if also else ""
                key = (block.heading, method + ",", row.label[1], row.label[2] + also)
                found.setdefault(key, []).append((value, average))
    made = []
    for (heading, method, setup, source), points in found.items():
        values, cells = zip(*sorted(points, key=lambda p: float(p[0])), strict=True)
        label = f"{method} {setup}, {source}"
        made.append(SweptLine(heading, label, values, cells, source == "paper"))
    return made


@dataclass(frozen=True, slots=True)
class Point:
    """A method's inference time per token (microseconds) and average accuracy (percent)."""

    panel: str
    method: str
    latency: float
    accuracy: float
    low: float | None = None
    high: float | None = None


def _times(record: Mapping[str, Any]) -> dict[str, float]:
    """Inference time per token (microseconds) of each method with this project's kernels."""
    rows = record["rows"]
    return {
        METHOD_TITLES[method]: rows[method]["infer_forward_us_per_token"]
        for method in PAPER_METHODS
        if "infer_forward_us_per_token" in rows.get(method, ())
    }


def _preference(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key that prefers benchmarks on a GPU, with more methods, in bf16, with more tokens per
    pass, with more rounds; ties are broken by name."""
    config = record["config"]
    return (
        bool(record["provenance"]["hardware"]["gpus"]),
        len(_times(record)),
        config["dtype"] == "bfloat16",
        config["batch"] * config["length"],
        config.get("rounds", 0),
        record["name"],
    )


def latency_points(
    folder: Path, tables: Mapping[int, Table], benchmarks: Sequence[Mapping[str, Any]]
) -> list[Point]:
    """Return points of Figure 4c: the paper's (Table 1's average for LLaMA-2 7B, Table 6's
    optimised implementation), and each block of Table 2 whose model has a benchmark of this
    project's kernels that includes LoRA. Times of different benchmarks are never combined."""
    points = []
    accuracy, latency = read_paper(folder, 1), read_paper(folder, 6)
    for method, optimized in (("lora", ""), ("dora", ""), ("mixlora", "yes")):
        line = latency.line(method=method, optimized=optimized, models="1")
        average = accuracy.line(model="llama2_7b", method=method)["avg"]
        title = METHOD_TITLES[method]
        points.append(
            Point("LLaMA-2 7B: the paper", title, float(line["infer_forward_us"]), float(average))
        )
    measured: dict[str, tuple[str, dict[str, float]]] = {}
    for record in sorted(benchmarks, key=_preference, reverse=True):
        times, config = _times(record), record["config"]
        if config["layers"] is None and config["dropout"] and "LoRA" in times and len(times) > 1:
            hardware = record["provenance"]["hardware"]
            machine = ", ".join(hardware["gpus"]) or hardware["cpu"]
            where = f"latency: {config['dtype']}, {config['batch']} x {config['length']}, {machine}"
            measured.setdefault(config["model"], (where, times))
    for block in tables[2].blocks:
        model = next((m for m, t in MODEL_TITLES.items() if block.heading.startswith(t)), None)
        # The measured times are those of the fused kernels.
        if not block.run or model not in measured or "kernel=peft" in block.heading:
            continue
        for row in block.rows:
            where, times = measured[model]
            cell, time = row.cells[block.columns.index(AVERAGE)], times.get(row.label[0])
            if row.label[1:] == ("MT", "ours") and cell.value is not None and time is not None:
                panel = f"{block.heading}; {where}"
                points.append(Point(panel, row.label[0], time, cell.value, cell.low, cell.high))
    return points


MIXED = 5
"""Number of tasks in the paper's mixture."""


@dataclass(frozen=True, slots=True)
class Load:
    """Share of the (token, slot) pairs routed to each expert: `by_task` (tasks, E), mean over
    layers; `by_layer` (layers, E), mean over tasks. `spread`: per task, the standard deviation over
    experts of those means; `spread_within`: standard deviation within each layer, averaged over
    layers, which is larger."""

    title: str
    run: str
    tasks: tuple[str, ...]
    by_task: tuple[tuple[float, ...], ...]
    by_layer: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...]
    spread_within: tuple[float, ...]


def _load(run: RecordedRun, protocol: str, title: str) -> Load | None:
    loads = {
        task: score["expert_load"]
        for (task, own), score in run.scores.items()
        if own == protocol and score.get("expert_load")
    }
    if not loads:
        return None
    by_task = [[mean(shares) for shares in zip(*load, strict=True)] for load in loads.values()]
    by_layer = [
        [mean(shares) for shares in zip(*layers, strict=True)]
        for layers in zip(*loads.values(), strict=True)
    ]
    return Load(
        f"{METHOD_TITLES[run.method]}, {title}",
        run.name,
        tuple(TASK_TITLES.get(task, task) for task in loads),
        tuple(map(tuple, by_task)),
        tuple(map(tuple, by_layer)),
        tuple(pstdev(shares) for shares in by_task),
        tuple(mean(pstdev(layer) for layer in load) for load in loads.values()),
    )


def loads(blocks: Blocks, standards: Standards) -> list[Load]:
    """Return the loads of Figure 5: per block, one run (the lowest seed) of each method with
    experts, in the setting of Table 3 and trained on at least five tasks."""
    found = []
    for key, runs in blocks.runs.items():
        first: dict[str, RecordedRun] = {}
        for run in sorted(runs, key=lambda run: (run.seed, run.name)):
            if run.mixture and len(run.mix) >= MIXED and not deviations(run, standards):
                first.setdefault(run.method, run)
        for run in first.values():
            mix = "+".join(run.mix)
            load = _load(run, key[1], f"trained on {mix}; {block_title(key, standards)[0]}")
            if load is not None:
                found.append(load)
    return found


@dataclass(frozen=True, slots=True)
class Curve:
    """Training loss by optimizer step. `step_size`: alpha and learning rate, which decide how fast
    the loss falls early."""

    panel: str
    method: str
    step_size: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


FREE = (
    "trainer.learning_rate", "trainer.epochs", "trainer.max_steps", "trainer.micro_batch_size",
    "data.train_limit", "data.train_limits", "data.forms", "data.seed", "train.data.seed",
)  # fmt: skip
"""Conditions in which curves of one figure may differ: they decide the length of a curve, or stand
beside it."""


def _usual(run: RecordedRun, standards: Standards) -> bool:
    """Return whether a run has Table 3's settings, but for its step size and length: losses on
    other tokens, other ranks or switches are no like conditions."""
    found = run.conditions(next(iter(run.scores))[1])
    usual = standards.conditions(run.model)
    return (
        deviations(run, standards).keys() <= {"alpha"}
        and "train.model.quantization" not in found
        and "model.quantization" not in found
        and all(
            found[name] == value
            for name, value in usual.items()
            if name in found and name not in FREE and not name.startswith("evaluation.")
        )
    )


def learning_curves(runs: Sequence[RecordedRun], standards: Standards) -> list[Curve]:
    """Learning curves of runs at Table 3's settings with at least three logged losses."""
    found = []
    for run in runs:
        if run.method == "none" or not _usual(run, standards):
            continue
        train = run.record["train"]
        curve = [] if train is None else train["curve"]
        if len(curve) < 3:
            continue
        model = MODEL_TITLES.get(run.model, run.model)
        forms = ", ".join(run.trained["data"]["forms"])
        mixes = {5: "five tasks mixed", 8: "eight tasks mixed"}
        mix = mixes.get(len(run.mix), ", ".join(run.mix))
        panel = f"{model}, {run.trained['data']['name']}, {mix}, answers: {forms}"
        data = run.trained["data"]
        if data["train_limit"] is not None:
            panel += f", {data['train_limit']} rows per task"
        panel += "".join(f", {n:,} of {task}" for task, n in data["train_limits"].items())
        found.append(
            Curve(
                panel,
                run.method,
                str(step_size(run)),
                tuple(entry["step"] for entry in curve),
                tuple(entry["loss"] for entry in curve),
            )
        )
    return found
