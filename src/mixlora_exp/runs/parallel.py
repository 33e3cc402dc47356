"""Refusals of settings that several processes cannot train with, before anything is read."""

from __future__ import annotations

import sys
from typing import NoReturn

from mixlora_exp.config.choices import Compile
from mixlora_exp.config.schema import Config, LoraMethodConfig, Parallel, TrainedMethodConfig
from mixlora_exp.system.device import processes
from mixlora_exp.system.exit_codes import MISTAKE


def check_processes(config: Config) -> None:
    """Refuse a run that the started processes cannot train together.

    Raises:
        SystemExit: with exit code 2; the first process printed the reason.
    """
    trainer, count = config.trainer, processes().num_processes
    if count == 1 or not isinstance(config.method, TrainedMethodConfig):
        return
    if trainer.parallel is Parallel.none:
        _refuse(
            f"trainer.parallel=none trains in one process, but {count} were started: add "
            "trainer.parallel=ddp, or start train.py without torchrun"
        )
    if trainer.batch_size % (trainer.micro_batch_size * count):
        _refuse(
            f"trainer.batch_size={trainer.batch_size} cannot be shared by {count} processes in "
            f"micro-batches of trainer.micro_batch_size={trainer.micro_batch_size}: start a number "
            f"of processes that divides {trainer.accumulation_steps}, or choose a smaller "
            "micro-batch"
        )
    if trainer.auto_micro_batch:
        _refuse(
            f"trainer.auto_micro_batch=true supports one process, but {count} were started, and "
            "those that do not run out of memory would wait for the others: set a smaller "
            "trainer.micro_batch_size instead"
        )
    if trainer.parallel is Parallel.fsdp:
        _check_sharded(config)


def _check_sharded(config: Config) -> None:
    method = config.method
    # No gradients of frozen weights there, and PEFT's own types were not tried.
    if method.needs_base_gradient or not isinstance(method, LoraMethodConfig):
        _refuse(
            f"trainer.parallel=fsdp was not tried with method={method.name}: use "
            "trainer.parallel=ddp"
        )
    if config.trainer.compile is not Compile.off:
        _refuse(
            f"trainer.parallel=fsdp was not tried with trainer.compile="
            f"{config.trainer.compile.value}: leave it off, or use trainer.parallel=ddp"
        )


def _refuse(message: str) -> NoReturn:
    """Refuse what all processes find wrong alike: one line, not one per process."""
    if processes().is_main_process:
        sys.stderr.write(f"error: {message}\n")
    # The launcher ends the others as soon as one has exited.
    processes().wait_for_everyone()
    raise SystemExit(MISTAKE)
