"""Run a benchmark: all rows interleaved in one process, and everything it says in one dict."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from mixlora_exp.bench.measure import feed_forward_saved_bytes, inference_step, training_step
from mixlora_exp.bench.memory import measure_in_process
from mixlora_exp.bench.model import adapted, base_model, model_config
from mixlora_exp.bench.settings import BASELINE, PAIRS, ROWS, BenchConfig
from mixlora_exp.errors import UserError

__all__ = ["benchmark", "check"]

Samples = dict[str, list[dict[str, float]]]


def check(config: BenchConfig) -> None:
    """Raises:
    UserError: a value is out of range or a row is unknown.
    """
    for name in ("batch", "length", "rounds", "infer_every"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be >= 1")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout={config.dropout} must be in [0, 1)")
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={config.dtype} is unknown: choose float32, bfloat16 or float16")
    unknown = [row for row in config.rows if row not in ROWS]
    if unknown:
        raise UserError(f"rows={unknown[0]} is unknown: choose from {', '.join(ROWS)}")
    if BASELINE not in config.rows:
        raise UserError(f"rows={config.rows} lack {BASELINE}, which the others are compared with")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
    )


def _measure(
    config: BenchConfig, model: nn.Module, row: str, ids: torch.Tensor, number: int
) -> dict[str, float]:
    forward, backward = training_step(model, ROWS[row], ids)
    sample = {"round": number, "train_forward_s": forward, "train_backward_s": backward}
    if number % config.infer_every == 0:
        sample["infer_forward_s"] = inference_step(model, ids)
    return sample


def _cuda_memory(config: BenchConfig, model: nn.Module, row: str, ids: torch.Tensor) -> dict:
    """Peak bytes allocated for this row: the weights, its own adapter, and the step."""
    device = ids.device
    others = torch.cuda.memory_allocated(device)
    own = {p.data_ptr(): p.nbytes for p in model.parameters()}
    found = {}
    for name, step in (
        ("infer_peak_memory_bytes", lambda: inference_step(model, ids)),
        ("train_peak_memory_bytes", lambda: training_step(model, ROWS[row], ids)),
    ):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        found[name] = torch.cuda.max_memory_allocated(device) - others + sum(own.values())
    return found


def benchmark(
    config: BenchConfig, *, deadline: float | None = None, say: Callable[[str], None] = _say
) -> dict[str, Any]:
    """Measure `config.rows`; `deadline` (of `time.monotonic`) ends the rounds early.

    Returns times per token (microseconds, medians with quartiles), ratios to the baseline taken
    round by round, saved bytes of a feed-forward block per token, and peak memory. A row that runs
    out of memory has `error` in place of figures.
    """
    check(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.threads:
        torch.set_num_threads(config.threads)
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), device, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    size = (config.batch, config.length)
    ids = torch.randint(shape.config["vocab_size"], size, generator=generator)
    ids = ids.to(device)
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    samples: Samples = {}
    for row in config.rows:
        if ROWS[row].kernel == "triton" and device == "cpu":
            rows[row] = {**asdict(ROWS[row]), "error": "not measured: needs a GPU"}
            continue
        if deadline is not None and time.monotonic() > deadline:
            rows[row] = {**asdict(ROWS[row]), "error": "not measured: no time left"}
            continue
        # The first step of a row is its warm-up and shows whether it fits.
        try:
            model = adapted(base, ROWS[row], config.dropout, config.seed)
            _measure(config, model, row, ids, 0)
            rows[row] = {**asdict(ROWS[row]), "rank": ROWS[row].rank}
            if ROWS[row].method not in ("base", "floor"):
                tokens = min(config.batch * config.length, 1024)
                rows[row]["feed_forward_saved_bytes_per_token"] = round(
                    feed_forward_saved_bytes(model, tokens), 1
                )
            if config.memory and device == "cuda":
                rows[row] |= _cuda_memory(config, model, row, ids)
            models[row], samples[row] = model, []
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            rows[row] = {**asdict(ROWS[row]), "error": "out of memory"}
            gc.collect()
        say(f"{row}: {rows[row].get('error', 'ready')}")
    for number in range(config.rounds):
        if deadline is not None and time.monotonic() > deadline:
            say(f"stopped after {number} of {config.rounds} rounds for want of time")
            break
        # Another order each round, so that no row always follows the same one.
        names = list(models)
        random.Random(config.seed + number).shuffle(names)
        for row in names:
            if number % ROWS[row].every:
                continue
            try:
                samples[row].append(_measure(config, models[row], row, ids, number))
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                # The other rows go on; what this one has measured so far says nothing.
                rows[row]["error"] = f"out of memory in round {number + 1}"
                del models[row], samples[row]
                gc.collect()
                say(f"{row}: {rows[row]['error']}")
        say(f"round {number + 1}/{config.rounds}")
    for row, taken in samples.items():
        reference = samples.get(BASELINE, [])
        rows[row] |= _summary(taken, reference, config.batch * config.length)
        if row in PAIRS and PAIRS[row] in samples:
            rows[row]["train_ratio_to"] = _pair(taken, samples[PAIRS[row]], PAIRS[row])
    models.clear()
    if config.memory and device == "cpu":
        del base
        gc.collect()
        for row in samples:
            rows[row] |= measure_in_process(config, row)
            say(f"memory of {row}")
    return {
        "config": asdict(config),
        "device": device,
        "threads": torch.get_num_threads(),
        "tokens": config.batch * config.length,
        "layers": shape.config["num_hidden_layers"],
        "rows": rows,
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def _summary(taken: list[dict], reference: list[dict], tokens: int) -> dict[str, Any]:
    """Medians and quartiles per token, and of the ratios within the same rounds."""
    if not taken:
        return {"rounds": 0}
    found: dict[str, Any] = {"rounds": len(taken)}
    timed = [key for key in taken[0] if key.endswith("_s")]
    for key in timed:
        low, middle, high = _quartiles([s[key] for s in taken if key in s])
        name = key.removesuffix("_s") + "_us_per_token"
        found[name] = round(middle * 1e6 / tokens, 3)
        found[name + "_quartiles"] = [round(v * 1e6 / tokens, 3) for v in (low, high)]
    by_round = {s["round"]: s for s in reference}
    pairs = [(s, by_round[s["round"]]) for s in taken if s["round"] in by_round]
    parts = {key.removesuffix("_s"): (key,) for key in timed}
    parts["train"] = ("train_forward_s", "train_backward_s")
    for name, keys in parts.items():
        both = [(a, b) for a, b in pairs if all(k in a and k in b for k in keys)]
        ratios = [sum(a[k] for k in keys) / sum(b[k] for k in keys) for a, b in both]
        if ratios:
            low, middle, high = _quartiles(ratios)
            found[f"{name}_ratio"] = round(middle, 4)
            found[f"{name}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    totals = [s["train_forward_s"] + s["train_backward_s"] for s in taken]
    # Something else ran then: medians bear a few of them.
    found["disturbed_rounds"] = sum(t > 2 * statistics.median(totals) for t in totals)
    found["samples"] = taken
    return found


def _pair(taken: Sequence[dict], others: Sequence[dict], name: str) -> dict[str, Any]:
    """Ratio of a row's training step to another row's within the same rounds."""

    def total(sample: dict) -> float:
        return sample["train_forward_s"] + sample["train_backward_s"]

    by_round = {s["round"]: total(s) for s in others}
    ratios = [total(s) / by_round[s["round"]] for s in taken if s["round"] in by_round]
    low, middle, high = _quartiles(ratios)
    quartiles = [round(low, 4), round(high, 4)]
    return {"row": name, "median": round(middle, 4), "quartiles": quartiles, "rounds": len(ratios)}
