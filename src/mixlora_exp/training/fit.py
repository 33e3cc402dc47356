"""One training run: arguments from the configuration, the Trainer, and a summary of what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from mixlora_exp.adapters import save_adapter
from mixlora_exp.config.schema import Config
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError
from mixlora_exp.system.device import (
    peak_memory_bytes,
    processes,
    reset_peak_memory,
    resolve_device,
)
from mixlora_exp.system.signals import deferred
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.joint.job import total_steps
from mixlora_exp.training.last_good import diverged_message, keep_last_good
from mixlora_exp.training.progress import LogFile, SendLogs, StopWhenAsked, Watch, progress_callback
from mixlora_exp.training.stability import Diverged, Stability
from mixlora_exp.training.tracking.tracking import Tracking
from mixlora_exp.training.trainer import MixLoraTrainer

__all__ = [
    "RECOMPUTE",
    "NotEnoughMemory",
    "TrainSummary",
    "fit",
    "training_arguments",
]


# Reentrant recomputation would lose the router loss's gradient.
RECOMPUTE = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


class _WhileOwned(TrainerCallback):
    """Ends the training of a run that another process has taken over."""

    def __init__(self, check_owner: Callable[[], None]) -> None:
        self.check_owner = check_owner

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.check_owner()


class NotEnoughMemory(UserError):
    """A micro-batch does not fit the device's memory."""


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What training did. `shortened` examples lost context to the cut-off, those `over_cutoff` had
    none to lose and stayed longer. `tokens` are real tokens (no padding); `expert_load` (layers, E)
    is the share of (token, slot) pairs that each expert got."""

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
    micro_batch_size: int | None = None
    """Examples of a forward pass, over which the router loss is taken, as they were in fact."""
    halved_micro_batch: int | None = None
    """With `trainer.auto_micro_batch`, the size that was used after the configured one did not
    fit; a step has the same examples and the same normalisation."""
    together: list[str] = field(default_factory=list)
    """Other runs that shared the base model and the passes."""


def training_arguments(config: Config, folder: Path, dtype: torch.dtype) -> TrainingArguments:
    """Table 3's values and what the paper leaves open, in the Trainer's words.

    Raises:
        UserError: `batch_size` cannot be shared out evenly over the processes.
    """
    trainer = config.trainer
    count = processes().num_processes
    if trainer.batch_size % (trainer.micro_batch_size * count):
        raise UserError(
            f"trainer.micro_batch_size={trainer.micro_batch_size} on {count} processes does "
            f"not divide trainer.batch_size={trainer.batch_size}: choose a smaller one"
        )
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=trainer.micro_batch_size,
        gradient_accumulation_steps=trainer.accumulation_steps // count,
        learning_rate=trainer.learning_rate,
        weight_decay=trainer.weight_decay,
        lr_scheduler_type=_schedule(config),
        warmup_steps=trainer.warmup_steps,
        # 0 is the Trainer's word for no clipping.
        max_grad_norm=trainer.max_grad_norm or 0.0,
        num_train_epochs=trainer.epochs,
        max_steps=-1 if trainer.max_steps is None else trainer.max_steps,
        optim="adamw_torch_fused",
        bf16=dtype is torch.bfloat16,
        **(RECOMPUTE if trainer.gradient_checkpointing else {}),
        logging_steps=trainer.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        run_name=folder.parent.name,
        use_cpu=resolve_device().type == "cpu",
        remove_unused_columns=False,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _schedule(config: Config) -> str:
    # The Trainer's "constant" takes no notice of warm-up steps.
    warms_up = config.trainer.schedule == "constant" and config.trainer.warmup_steps > 0
    return "constant_with_warmup" if warms_up else config.trainer.schedule


def fit(
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    folder: Path,
    dtype: torch.dtype,
    checkpoints: Checkpoints | None = None,
    tracking: Tracking | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> TrainSummary:
    """Train `model` in place on `examples`; logs go to the run's `folder`, and to a tracker. With
    `checkpoints` it goes on from the newest one, and writes more. `watch` is told step and loss of
    every log entry, without router loss, and may raise to end the training.

    Raises:
        UserError: the loss is no longer a finite number, or memory does not suffice.
    """
    arguments = training_arguments(config, folder / "trainer", dtype)
    # Several visible GPUs without torchrun would be used through nn.DataParallel, which multiplies
    # the batch and cannot split `logits_to_keep`.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if checkpoints is not None:
        arguments.save_strategy = SaveStrategy.STEPS
        arguments.save_steps = config.trainer.save_steps
    trainer = MixLoraTrainer(
        model=model,
        args=arguments,
        train_dataset=list(examples),
        data_collator=Collator(
            tokenizer.pad_token_id,
            config.trainer.loss_on,
            config.trainer.padding_in_loss,
            tokenizer.padding_side,
        ),
        sampler_seed=config.seed,
        head=config.trainer.head,
        order=config.trainer.order,
        checkpoints=checkpoints,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if checkpoints is not None:
        # Before anything is written after a step.
        trainer.add_callback(_WhileOwned(checkpoints.check_owner))

    def tokens() -> int:
        # Every process has about as many.
        return int(trainer.track.tokens) * arguments.world_size

    log = folder / "train_log.jsonl"
    trainer.add_callback(progress_callback(tokens))
    trainer.add_callback(LogFile(log, lambda: trainer.expert_load))
    if tracking is not None:
        # After the log file's, which cuts what is going to be done again.
        trainer.add_callback(SendLogs(tracking, log, tokens, lambda: trainer.expert_load))
    if watch is not None:
        # Runs of different coefficients are compared by it.
        coefficient = getattr(config.method, "router_loss_coef", 0.0)
        trainer.add_callback(Watch(watch, coefficient))
    start = time.perf_counter()
    reset_peak_memory(trainer.args.device)
    trainer.add_callback(StopWhenAsked())
    try:
        with deferred():
            trainer.train_or_resume(total_steps(config, len(examples)))
        trainer.check_end()
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(
            f"trainer.micro_batch_size={config.trainer.micro_batch_size}: the device's memory does "
            "not suffice; nothing was recorded. Choose a smaller one, or set "
            "trainer.auto_micro_batch=true or trainer.gradient_checkpointing=true"
        ) from error
    except Diverged as error:
        kept = None
        if processes().is_main_process:
            kept = keep_last_good(
                error, trainer.trained(), checkpoints, partial(save_adapter, model), folder
            )
        raise UserError(diverged_message(config, error, kept)) from error
    seconds = trainer.seconds_before + time.perf_counter() - start
    track, load = trainer.track, trainer.track.expert_load()
    curve = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = trainer.state.global_step
    tokens = _tokens_seen(trainer, examples, steps, config)
    return TrainSummary(
        examples=len(examples),
        shortened=sum(example.shortened for example in examples),
        over_cutoff=sum(len(e.input_ids) > config.data.cutoff_length for e in examples),
        steps=steps,
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 2),
        peak_memory_bytes=peak_memory_bytes(trainer.args.device),
        final_loss=curve[-1]["loss"] if curve else track.watch.losses[-1],
        curve=curve,
        expert_load=load,
        stability=track.watch.summary(),
        micro_batch_size=config.trainer.micro_batch_size,
    )


def _tokens_seen(
    trainer: MixLoraTrainer, examples: Sequence[Example], steps: int, config: Config
) -> int:
    """Real tokens of the batches that the optimizer saw, from the sampler's own order."""
    sampler = trainer._get_train_sampler(examples)
    remaining = steps * config.trainer.batch_size
    tokens, epoch = 0, 0
    while remaining > 0:
        sampler.set_epoch(epoch)
        order = list(sampler)[:remaining]
        tokens += sum(len(examples[i].input_ids) for i in order)
        # The last, incomplete batch of an epoch is a step of its own.
        remaining -= -(-len(order) // config.trainer.batch_size) * config.trainer.batch_size
        epoch += 1
    return tokens
