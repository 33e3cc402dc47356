"""`kind=steps`: what a training step and a forward pass of each method cost, in time and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from mixlora_exp.bench.baselines import check_liger, patch_with_liger
from mixlora_exp.bench.batch import StepBatch, batch_of
from mixlora_exp.bench.gradients import allowed, gradients_of, largest_difference
from mixlora_exp.bench.interleaved import Sample, interleaved, pair, summary
from mixlora_exp.bench.measure import feed_forward_saved_bytes, inference_step, training_step
from mixlora_exp.bench.memory import measure_in_process
from mixlora_exp.bench.model import base_model, base_of, model_config, model_of
from mixlora_exp.bench.options import StepOptions, as_json, require_dtype, require_positive
from mixlora_exp.bench.recorded import RecordedStep
from mixlora_exp.bench.report import markdown
from mixlora_exp.bench.row_registry import BASELINE, PAIRS, ROWS, BenchRow, NotHere
from mixlora_exp.bench.runner import Kind, echo, machine_slug
from mixlora_exp.bench.step_profile import launches_per_layer, step_profile
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import KERNELS
from mixlora_exp.training.compiled import Refusal, compiled_layers
from mixlora_exp.training.cuda_graphs import CudaRecorder


def check(config: StepOptions) -> None:
    """Check the settings.

    Raises:
        UserError: a value is out of range or a row is unknown.
    """
    require_positive(config, "batch", "length", "answer", "rounds", "infer_every")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout={config.dropout} must be in [0, 1)")
    require_dtype(config.dtype)
    unknown = [row for row in config.rows if row not in ROWS]
    if unknown:
        raise UserError(f"rows={unknown[0]} is unknown: choose from {', '.join(ROWS)}")
    if config.liger:
        check_liger()
    if BASELINE not in config.rows:
        raise UserError(f"rows={config.rows} lack {BASELINE}, which the others are compared with")


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
    )


def _why_not(config: StepOptions, row: BenchRow, device: str) -> str | None:
    """Return why this machine does not measure a row; None if it does."""
    if device == "cpu" and (KERNELS[row.kernel].device == "cuda" or row.recorded):
        return "not measured: needs a GPU"
    if not row.autocast and config.dtype != "bfloat16":
        return f"not measured: there is no autocast beside {config.dtype}"
    return None


def _measure(
    config: StepOptions, model: nn.Module | RecordedStep, row: str, batch: StepBatch, number: int
) -> Sample:
    if isinstance(model, RecordedStep):
        return {"train_s": model()}
    forward, backward = training_step(model, ROWS[row], batch)
    sample = {"train_forward_s": forward, "train_backward_s": backward}
    if number % config.infer_every == 0 and not ROWS[row].compiled:
        sample["infer_forward_s"] = inference_step(model, ROWS[row], batch)
    return sample


def _cuda_memory(model: nn.Module, row: BenchRow, batch: StepBatch) -> dict[str, int]:
    """Peak bytes allocated for this row: the weights, its own adapter, and the step."""
    device = batch.ids.device
    others = torch.cuda.memory_allocated(device)
    own = {p.data_ptr(): p.nbytes for p in model.parameters()}
    found = {}
    for name, step in (
        ("infer_peak_memory_bytes", lambda: inference_step(model, row, batch)),
        ("train_peak_memory_bytes", lambda: training_step(model, row, batch)),
    ):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        found[name] = torch.cuda.max_memory_allocated(device) - others + sum(own.values())
    return found


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


class _Rows:
    """The rows of one benchmark, on one base."""

    def __init__(self, config: StepOptions, echo: Callable[[str], None]) -> None:
        self.config, self.echo = config, echo
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = model_config(config.model, config.layers)
        self.layers = shape.config["num_hidden_layers"]
        dtype = getattr(torch, config.dtype)
        self.base = base_model(shape, dtype, self.device, config.seed)
        if config.liger:
            patch_with_liger(self.base)
        self.batch = batch_of(config, shape.config["vocab_size"], self.device)
        self.found: dict[str, dict[str, Any]] = {}
        self.models: dict[str, nn.Module | RecordedStep] = {}
        self.refusals: dict[str, Refusal] = {}
        self.contexts = ExitStack()

    def prepare(self, deadline: float | None) -> None:
        """Make each row's model and take its first step, which warms it up and shows if it fits."""
        for name in self.config.rows:
            row = ROWS[name]
            self.found[name] = {**asdict(row), "compile": row.compile.value, "rank": row.rank}
            reason = _why_not(self.config, ROWS[name], self.device)
            if reason is None and _late(deadline):
                reason = "not measured: no time left"
            try:
                if reason is None:
                    self.models[name] = model = self.ready(name)
                    _measure(self.config, model, name, self.batch, 0)
                    refused = self.refusals[name].reason if name in self.refusals else None
                    if row.recorded:
                        self.found[name]["not_compiled"] = refused
                    else:
                        reason = refused
            except NotHere as error:
                reason = str(error)
            except Exception as error:
                if _out_of_memory(error):
                    reason = "out of memory"
                elif ROWS[name].compiled:
                    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                    reason = f"not measured: torch.compile failed: {text}"
                else:
                    raise
            if reason is not None:
                self.drop(name, reason)
            else:
                self.echo(f"{name}: ready")

    def ready(self, name: str) -> nn.Module | RecordedStep:
        """Return a row's model or, where its step is to be recorded, that step.

        Raises:
            NotHere: compiled or recorded, it has other gradients than eager.
        """
        row = ROWS[name]
        made = model = model_of(name, self.base, self.config.dropout, self.config.seed)
        if not row.compiled:
            return model
        expected = gradients_of(model, row, self.batch)
        if row.stock:
            for layer in base_of(model).model.layers:
                layer.compile()
        else:
            context = compiled_layers(base_of(model), row.compile)
            self.refusals[name] = self.contexts.enter_context(context)
        if row.recorded:
            made = RecordedStep(model, row, self.batch, CudaRecorder(self.base.device))
        difference = largest_difference(gradients_of(made, row, self.batch), expected)
        most = allowed(row, self.batch.dtype)
        if not difference.relative <= most:
            raise NotHere(
                f"wrong gradients: {difference.parameter} is off by {difference.relative:.2g} of "
                f"the eager step's (allowed: {most:g})"
            )
        self.found[name]["gradient_difference"] = asdict(difference)
        return made

    def drop(self, name: str, reason: str) -> None:
        self.found[name]["error"] = reason
        self.models.pop(name, None)
        gc.collect()
        self.echo(f"{name}: {reason}")

    def lost(self, name: str, number: int, error: Exception) -> bool:
        """Return whether to give up a row that raised: the others go on, and its measurements so
        far are dropped."""
        if not _out_of_memory(error):
            return False
        self.drop(name, f"out of memory in round {number + 1}")
        return True

    def rounds(self, deadline: float | None) -> None:
        """Measure all rows in turns."""
        config, models = self.config, self.models
        samples = interleaved(
            {r: lambda number, r=r: _measure(config, models[r], r, self.batch, number)
             for r in models},
            config.rounds, config.seed, every={r: ROWS[r].every for r in models},
            deadline=deadline, lost=self.lost, echo=self.echo,
        )  # fmt: skip
        for row, taken in samples.items():
            reference = samples.get(BASELINE, [])
            self.found[row] |= summary(taken, reference, config.batch * config.length)
            if row in PAIRS and PAIRS[row] in samples and taken:
                self.found[row]["train_ratio_to"] = pair(taken, samples[PAIRS[row]], PAIRS[row])

    def details(self, deadline: float | None) -> None:
        """Measure kept bytes and launches of each row, on a GPU also busy time and memory."""
        for name, model in self.models.items():
            row, found = ROWS[name], self.found[name]
            if _late(deadline):
                self.echo(f"{name}: no time left for its launches and memory")
                continue
            if self.device == "cuda":
                step = model if row.recorded else partial(training_step, model, row, self.batch)
                found |= step_profile(step, self.batch.ids.device, top=25)
                if self.config.memory and not row.compiled:
                    found |= _cuda_memory(model, row, self.batch)
            if row.compiled or row.method == "base":
                continue
            found["launches_per_layer"] = launches_per_layer(model, row, self.batch)
            if row.method != "floor":
                kept = feed_forward_saved_bytes(model, row, self.batch)
                found["feed_forward_saved_bytes_per_token"] = round(kept, 1)

    def memory_in_processes(self) -> None:
        """Measure the memory of each row in a process of its own, one after another."""
        names = [name for name in self.models if not ROWS[name].compiled]
        self.models.clear()
        del self.base
        gc.collect()
        for name in names:
            self.found[name] |= measure_in_process(self.config, name)
            self.echo(f"memory of {name}")

    def record(self) -> dict[str, Any]:
        return {
            "config": as_json(self.config),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "tokens": self.config.batch * self.config.length,
            "layers": self.layers,
            "rows": {name: dict(row) for name, row in self.found.items()},
        }


def benchmark_parts(
    config: StepOptions,
    *,
    deadline: float | None = None,
    details_until: float | None = None,
    echo: Callable[[str], None] = echo,
) -> Iterator[dict[str, Any]]:
    """Measure `config.rows`. Yields the record with times, and again with launches, kept bytes and
    memory. `deadline` (of `time.monotonic`) ends the first part early, of which rows take at most
    three quarters to be ready, `details_until` the second.

    Times are per token (microseconds, medians with quartiles), with ratios to the baseline taken
    round by round. A row that runs out of memory or cannot be measured here has `error` in place of
    figures. `busy_us` and `kernels` are those of one step on a GPU, of which `by_kernel` names the
    longest.
    """
    check(config)
    rows = _Rows(config, echo)
    now = time.monotonic()
    with rows.contexts:
        rows.prepare(None if deadline is None else now + 0.75 * (deadline - now))
        rows.rounds(deadline)
        yield rows.record()
        rows.details(details_until)
    if config.memory and rows.device == "cpu":
        rows.memory_in_processes()
    yield rows.record()


def _name(record: Mapping[str, Any]) -> str:
    config = record["config"]
    parts = [machine_slug(record), config["model"], f"{record['layers']}layers"]
    shape = f"{config['batch']}x{config['length']}"
    return "-".join([*parts, shape, config["dtype"], f"dropout{config['dropout']:g}"])


def measure(config: StepOptions) -> Iterator[dict[str, Any]]:
    """Yield the record with times, and again with launches, kept bytes and memory."""
    yield from benchmark_parts(config)


KIND = Kind(options=StepOptions, measure=measure, name=_name, markdown=markdown)
