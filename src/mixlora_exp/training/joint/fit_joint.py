"""Several training runs on one base model at once, each with its own summary."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mixlora_exp.adapters.build import save_adapter
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.adapters.hosting import parameters_of
from mixlora_exp.config.schema import Config
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError
from mixlora_exp.system.device import peak_memory_bytes, reset_peak_memory, resolve_device
from mixlora_exp.system.signals import deferred
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.fit import RECOMPUTE, TrainSummary, training_arguments
from mixlora_exp.training.joint.job import Job
from mixlora_exp.training.joint.joint_trainer import JointTrainer
from mixlora_exp.training.last_good import diverged_message, keep_last_good
from mixlora_exp.training.progress import restart_log
from mixlora_exp.training.stability import Diverged
from mixlora_exp.training.tracking.tracking import Tracking

__all__ = ["fit_jointly", "make_job"]


def make_job(
    name: str,
    config: Config,
    examples: Sequence[Example],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Checkpoints | None = None,
    tracking: Tracking | None = None,
) -> Job:
    """The training of one adapter, as `config` has it. `name` is its name in the model; logs go to
    its run's `folder`.

    Raises:
        UserError: there are no examples.
    """
    if not examples:
        raise UserError(
            f"task.train={config.task.train}: there is nothing to train on; choose other data"
        )
    collate = Collator(
        tokenizer.pad_token_id,
        config.trainer.loss_on,
        config.trainer.padding_in_loss,
        tokenizer.padding_side,
    )
    job = Job(name, config, examples, folder, collate, checkpoints, tracking)
    restart_log(folder / "train_log.jsonl", job.step)
    if tracking is not None:
        tracking.begin(job.step, folder / "train_log.jsonl")
    return job


class _Trainer(JointTrainer):
    """Keeps the last good adapter of one that is taken out."""

    def diverged(self, job: Job, error: Diverged) -> str:
        def save(place: Path) -> None:
            save_adapter(self.model, place, job.name)

        kept = keep_last_good(error, job.parameters, job.checkpoints, save, job.folder)
        return diverged_message(job.config, error, kept)


def _arguments(config: Config, folder: Path) -> TrainingArguments:
    """Of the passes; what an adapter's optimizer does is told by its own arguments."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=resolve_device().type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=config.seed,
        **(RECOMPUTE if config.trainer.gradient_checkpointing else {}),
    )


def fit_jointly(
    model: PeftModel, jobs: Sequence[Job], dtype: torch.dtype
) -> Mapping[str, TrainSummary | str]:
    """Train the adapters of `model` that `jobs` name, in place and together.

    Returns each one's summary or, where it had to be taken out, why. `seconds` counts from the
    common start to the adapter's own last step, and `peak_memory_bytes` is that of all together.

    Raises:
        UserError: memory does not suffice.
    """
    arguments = {
        job.name: training_arguments(job.config, job.folder / "trainer", dtype) for job in jobs
    }
    for job in jobs:
        use_dropout_stream(model, job.name, job.stream)
        for name, parameter in parameters_of(model, job.name).items():
            frozen = "lora_magnitude" in name and not job.config.method.train_magnitude
            parameter.requires_grad_(not frozen)
        job.adopt(model)
    peak = _train(model, jobs, arguments, dtype) if any(job.running for job in jobs) else 0
    for job in jobs:
        shutil.rmtree(job.folder / "trainer", ignore_errors=True)
    return {job.name: job.failure or _summary(job, peak) for job in jobs}


def _train(
    model: PeftModel,
    jobs: Sequence[Job],
    arguments: Mapping[str, TrainingArguments],
    dtype: torch.dtype,
) -> int:
    """Train those that are not done; returns the peak memory."""
    config = jobs[0].config
    passes = _arguments(config, jobs[0].folder / "trainer")
    # Several visible GPUs without torchrun would be used through nn.DataParallel.
    passes._n_gpu = min(passes.n_gpu, 1)
    trainer = _Trainer(
        model,
        jobs,
        arguments,
        passes,
        config.trainer.head,
        dtype,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    reset_peak_memory(trainer.args.device)
    try:
        with deferred():
            trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"adapters: {len(jobs)} at once do not fit the device's memory; nothing was recorded. "
            "Train fewer together, or set a smaller trainer.micro_batch_size or "
            "trainer.gradient_checkpointing=true"
        ) from error
    return peak_memory_bytes(trainer.args.device)


def _summary(job: Job, peak: int) -> TrainSummary:
    track = job.track
    curve, seconds = track.curve, track.seconds
    return TrainSummary(
        examples=len(job.examples),
        shortened=sum(example.shortened for example in job.examples),
        over_cutoff=sum(len(e.input_ids) > job.config.data.cutoff_length for e in job.examples),
        steps=job.step,
        tokens=int(track.tokens),
        seconds=round(seconds, 3),
        tokens_per_second=round(int(track.tokens) / seconds, 2),
        peak_memory_bytes=peak,
        final_loss=curve[-1]["loss"] if curve else track.watch.losses[-1],
        curve=curve,
        expert_load=track.expert_load(),
        stability=track.watch.summary(),
        micro_batch_size=job.config.trainer.micro_batch_size,
    )
