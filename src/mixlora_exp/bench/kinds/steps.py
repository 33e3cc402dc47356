"""`kind=steps`: what a training step and a forward pass of each method cost, in time and memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from mixlora_exp.bench.measure import feed_forward_saved_bytes, inference_step, training_step
from mixlora_exp.bench.memory import measure_in_process
from mixlora_exp.bench.model import base_model, model_config, model_of
from mixlora_exp.bench.options import StepOptions, require_dtype, require_positive
from mixlora_exp.bench.report import markdown
from mixlora_exp.bench.rounds import Sample, interleaved, quartiles, ratios
from mixlora_exp.bench.rows import BASELINE, PAIRS, ROWS
from mixlora_exp.bench.runner import Kind, machine_slug, say
from mixlora_exp.errors import UserError

TRAIN = ("train_forward_s", "train_backward_s")


def check(config: StepOptions) -> None:
    """Raises:
    UserError: a value is out of range or a row is unknown.
    """
    require_positive(config, "batch", "length", "rounds", "infer_every")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout={config.dropout} must be in [0, 1)")
    require_dtype(config.dtype)
    unknown = [row for row in config.rows if row not in ROWS]
    if unknown:
        raise UserError(f"rows={unknown[0]} is unknown: choose from {', '.join(ROWS)}")
    if BASELINE not in config.rows:
        raise UserError(f"rows={config.rows} lack {BASELINE}, which the others are compared with")


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
    )


def _measure(
    config: StepOptions, model: nn.Module, row: str, ids: torch.Tensor, number: int
) -> Sample:
    forward, backward = training_step(model, ROWS[row], ids)
    sample = {"train_forward_s": forward, "train_backward_s": backward}
    if number % config.infer_every == 0:
        sample["infer_forward_s"] = inference_step(model, ids)
    return sample


def _cuda_memory(config: StepOptions, model: nn.Module, row: str, ids: torch.Tensor) -> dict:
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
    config: StepOptions, *, deadline: float | None = None, say: Callable[[str], None] = say
) -> dict[str, Any]:
    """Measure `config.rows`; `deadline` (of `time.monotonic`) ends the rounds early.

    Returns times per token (microseconds, medians with quartiles), ratios to the baseline taken
    round by round, saved bytes of a feed-forward block per token, and peak memory. A row that runs
    out of memory has `error` in place of figures.
    """
    check(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), device, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    size = (config.batch, config.length)
    ids = torch.randint(shape.config["vocab_size"], size, generator=generator)
    ids = ids.to(device)
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    for row in config.rows:
        if ROWS[row].kernel == "triton" and device == "cpu":
            rows[row] = {**asdict(ROWS[row]), "error": "not measured: needs a GPU"}
            continue
        if deadline is not None and time.monotonic() > deadline:
            rows[row] = {**asdict(ROWS[row]), "error": "not measured: no time left"}
            continue
        # The first step of a row is its warm-up and shows whether it fits.
        try:
            model = model_of(row, base, config.dropout, config.seed)
            _measure(config, model, row, ids, 0)
            rows[row] = {**asdict(ROWS[row]), "rank": ROWS[row].rank}
            if ROWS[row].method not in ("base", "floor"):
                tokens = min(config.batch * config.length, 1024)
                rows[row]["feed_forward_saved_bytes_per_token"] = round(
                    feed_forward_saved_bytes(model, tokens), 1
                )
            if config.memory and device == "cuda":
                rows[row] |= _cuda_memory(config, model, row, ids)
            models[row] = model
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            rows[row] = {**asdict(ROWS[row]), "error": "out of memory"}
            gc.collect()
        say(f"{row}: {rows[row].get('error', 'ready')}")

    def lost(row: str, number: int, error: Exception) -> bool:
        if not _out_of_memory(error):
            return False
        # The other rows go on; what this one has measured so far says nothing.
        rows[row]["error"] = f"out of memory in round {number + 1}"
        del models[row]
        gc.collect()
        say(f"{row}: {rows[row]['error']}")
        return True

    samples = interleaved(
        {r: lambda number, r=r: _measure(config, models[r], r, ids, number) for r in models},
        config.rounds, config.seed, every={r: ROWS[r].every for r in models},
        deadline=deadline, lost=lost, say=say,
    )  # fmt: skip
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


def _summary(taken: Sequence[Sample], reference: Sequence[Sample], tokens: int) -> dict[str, Any]:
    """Medians and quartiles per token, and of the ratios within the same rounds."""
    if not taken:
        return {"rounds": 0}
    found: dict[str, Any] = {"rounds": len(taken)}
    timed = [key for key in taken[0] if key.endswith("_s")]
    for key in timed:
        low, middle, high = quartiles([s[key] for s in taken if key in s])
        name = key.removesuffix("_s") + "_us_per_token"
        found[name] = round(middle * 1e6 / tokens, 3)
        found[name + "_quartiles"] = [round(v * 1e6 / tokens, 3) for v in (low, high)]
    parts = {key.removesuffix("_s"): (key,) for key in timed}
    for name, keys in {**parts, "train": TRAIN}.items():
        own = ratios(taken, reference, keys)
        if own:
            low, middle, high = quartiles(own)
            found[f"{name}_ratio"] = round(middle, 4)
            found[f"{name}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    totals = [s["train_forward_s"] + s["train_backward_s"] for s in taken]
    # Something else ran then: medians bear a few of them.
    found["disturbed_rounds"] = sum(t > 2 * statistics.median(totals) for t in totals)
    found["samples"] = taken
    return found


def _pair(taken: Sequence[Sample], others: Sequence[Sample], name: str) -> dict[str, Any]:
    """Ratio of a row's training step to another row's within the same rounds."""
    own = ratios(taken, others, TRAIN)
    low, middle, high = quartiles(own)
    both = [round(low, 4), round(high, 4)]
    return {"row": name, "median": round(middle, 4), "quartiles": both, "rounds": len(own)}


def _name(record: Mapping[str, Any]) -> str:
    config = record["config"]
    parts = [machine_slug(record), config["model"], f"{record['layers']}layers"]
    shape = f"{config['batch']}x{config['length']}"
    return "-".join([*parts, shape, config["dtype"], f"dropout{config['dropout']:g}"])


def measure(config: StepOptions) -> Iterator[dict[str, Any]]:
    yield benchmark(config)


KIND = Kind(options=StepOptions, measure=measure, name=_name, markdown=markdown)
