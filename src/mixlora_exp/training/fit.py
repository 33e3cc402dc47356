"""Trains one adapter, or several together, and summarises each training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from mixlora_exp.config.optimizers import FUSED_ADAMW
from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import NotEnoughMemory, UserError
from mixlora_exp.system.device import (
    peak_memory_bytes,
    processes,
    reset_peak_memory,
    resolve_device,
)
from mixlora_exp.system.signals import deferred, interrupt_deferred
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.job import Job, make_job
from mixlora_exp.training.progress import (
    LogFile,
    PerAdapter,
    ProgressLines,
    Watch,
    progress_callback,
)
from mixlora_exp.training.stability import Stability
from mixlora_exp.training.tracking import RunTracker
from mixlora_exp.training.trainer import MixLoraTrainer


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """Summary of a training run, part of the record.

    `shortened`: examples whose context was truncated; `over_cutoff`: examples without context to
    truncate, longer than the cut-off. `tokens`: without padding. `expert_load`: (layers, E), share
    of the (token, slot) pairs routed to each expert. `tokens_per_second`: of the start that
    finished, without its first step, unless it had no other.
    """

    examples: int
    shortened: int
    over_cutoff: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    final_loss: float
    curve: list[dict[str, Any]] = field(default_factory=list)
    expert_load: list[list[float]] | None = None
    stability: Stability | None = None
    not_chosen: dict[str, list[int]] | None = None
    """The experts without a gradient on the first micro-batch, by module; every other trained
    parameter had one. None: not checked."""
    kept_bytes_per_token: float | None = None
    """Bytes that autograd kept for the backward pass on the first micro-batch, for the whole model
    and the loss, without weights; per position, padding too. None with `trainer.compile`."""
    micro_batch_size: int | None = None
    """Examples per forward pass actually used, over which the router loss is computed."""
    first_step_seconds: float | None = None
    """Seconds of the first optimizer step of the start that finished, compilation included."""
    halved_micro_batch: int | None = None
    """Micro-batch size used by `trainer.auto_micro_batch` after the configured one did not fit in
    memory; the examples of an optimizer step and the normalisation of the loss are unchanged."""
    processes: int = 1
    """Number of processes that trained together, in the start that finished."""
    together: list[str] = field(default_factory=list)
    """Other runs that shared the base model and the forward passes."""


def fit(
    *,
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    folder: Path,
    dtype: torch.dtype,
    checkpoints: Checkpoints | None = None,
    tracker: RunTracker | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> TrainSummary:
    """Train the adapter of `model` in place on `examples`; see `Job` for the other arguments.

    Raises:
        UserError: the loss or its gradient is not finite, a file cannot be written, or memory is
            insufficient (`NotEnoughMemory`).
    """
    job = make_job(
        name=model.active_adapter,
        config=config,
        examples=examples,
        folder=folder,
        tokenizer=tokenizer,
        checkpoints=checkpoints,
        tracker=tracker,
        watch=watch,
    )
    found = fit_jointly(model=model, jobs=[job], dtype=dtype)[job.name]
    if isinstance(found, UserError):
        raise found
    return found


def fit_jointly(
    *, model: PeftModel, jobs: Sequence[Job], dtype: torch.dtype
) -> dict[str, TrainSummary | UserError]:
    """Train the adapters of `model` named by `jobs`, in place and in shared forward passes.

    Returns by adapter name its summary, or the error if it failed. `seconds` counts from the common
    start to the adapter's own last step; `peak_memory_bytes` is that of all adapters together.

    Raises:
        NotEnoughMemory: memory is insufficient.
    """
    for job in jobs:
        job.adopt(model)
    try:
        peak = _train(model, jobs, dtype) if any(job.running for job in jobs) else 0
    finally:
        for job in jobs:
            shutil.rmtree(job.folder / "trainer", ignore_errors=True)
    return {job.name: job.failure or _summary(job, peak) for job in jobs}


def _arguments(jobs: Sequence[Job], dtype: torch.dtype) -> TrainingArguments:
    """Return the Trainer's arguments, shared by all adapters; each `Job` has the settings that
    differ."""
    config, count = jobs[0].config, processes().num_processes
    recompute = {}
    if config.trainer.gradient_checkpointing:
        # Reentrant checkpointing would lose the gradient of the router loss.
        recompute = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    arguments = TrainingArguments(
        output_dir=str(jobs[0].folder / "trainer"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(j.config.trainer.accumulation_steps for j in jobs) // count,
        max_grad_norm=0.0,
        # Muon is torch's alone.
        optim=FUSED_ADAMW if config.trainer.optim == "muon" else config.trainer.optim,
        bf16=dtype is torch.bfloat16,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=resolve_device().type == "cpu",
        remove_unused_columns=False,
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Every parameter of an adapter that trains has a gradient in every pass.
        ddp_find_unused_parameters=False,
        **recompute,
    )
    # With several visible GPUs and no torchrun, the Trainer would use nn.DataParallel, which
    # multiplies the batch and cannot split `logits_to_keep`.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _train(model: PeftModel, jobs: Sequence[Job], dtype: torch.dtype) -> int:
    """Train the unfinished jobs and return the peak memory in bytes."""
    trainer = MixLoraTrainer(model=model, jobs=jobs, args=_arguments(jobs, dtype), dtype=dtype)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(PerAdapter({job.name: _callbacks(job, len(jobs)) for job in jobs}))
    reset_peak_memory(trainer.args.device)
    try:
        with deferred(), interrupt_deferred():
            trainer.train()
    except torch.OutOfMemoryError as error:
        size = f"trainer.micro_batch_size={jobs[0].config.trainer.micro_batch_size}"
        what = f"adapters: {len(jobs)} at once" if len(jobs) > 1 else size
        fewer = "Train fewer together, or set" if len(jobs) > 1 else "Choose"
        raise NotEnoughMemory(
            f"{what}: out of memory on the device; nothing was recorded. {fewer} a "
            "smaller trainer.micro_batch_size, or set trainer.auto_micro_batch=true (one adapter) "
            "or trainer.gradient_checkpointing=true"
        ) from error
    return peak_memory_bytes(trainer.args.device)


def _callbacks(job: Job, of: int) -> list[TrainerCallback]:
    """Return the callbacks that receive one adapter's log entries; `of`: number of adapters."""
    shown = progress_callback(job) if of == 1 else ProgressLines(job, f"{job.folder.name} ")
    found = [shown, LogFile(job)]
    if job.tracker is not None:
        found.append(job.tracker.follow(job))
    if job.watch is not None:
        found.append(Watch(job))
    return found


def _summary(job: Job, peak: int) -> TrainSummary:
    track = job.track
    tokens = track.total_tokens()
    return TrainSummary(
        examples=len(job.examples),
        shortened=sum(example.shortened for example in job.examples),
        over_cutoff=sum(len(e.input_ids) > job.config.data.cutoff_length for e in job.examples),
        steps=job.step,
        tokens=tokens,
        seconds=round(track.seconds, 3),
        tokens_per_second=round(track.tokens_per_second(), 2),
        peak_memory_bytes=peak,
        final_loss=track.curve[-1]["loss"] if track.curve else track.watch.losses[-1],
        curve=track.curve,
        expert_load=track.expert_load(),
        stability=track.watch.summary(),
        not_chosen=job.not_chosen,
        kept_bytes_per_token=job.kept_bytes_per_token,
        micro_batch_size=job.config.trainer.micro_batch_size,
        first_step_seconds=job.first_step_seconds,
        processes=processes().num_processes,
    )
