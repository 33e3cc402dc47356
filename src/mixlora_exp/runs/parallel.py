"""Refusals of settings that several processes cannot train with, before anything is read."""

from __future__ import annotations

import sys
from typing import NoReturn

from mixlora_exp.config.choices import Compile, Quantization
from mixlora_exp.config.schema import Config, LoraMethodConfig, Parallel, TrainedMethodConfig
from mixlora_exp.system.device import launcher_setting, processes
from mixlora_exp.system.exit_codes import MISTAKE

OVERRIDES = {
    "ACCELERATE_MIXED_PRECISION": ("trainer.precision", "--mixed_precision=no"),
    "ACCELERATE_DYNAMO_BACKEND": ("trainer.compile", "--dynamo_backend=no"),
}
"""Variables by which `accelerate launch` would change how a run computes: the field that says it
here, and the option with which it does not."""


def check_processes(config: Config) -> None:
    """Refuse a run that the started processes cannot train together.

    Raises:
        SystemExit: with exit code 2; the first process printed the reason.
    """
    reason = refusal(config, processes().num_processes)
    if reason is not None:
        _refuse(reason)


def refusal(config: Config, count: int) -> str | None:
    """Return why `count` processes of this environment cannot train the run, None if they can."""
    trainer = config.trainer
    if not isinstance(config.method, TrainedMethodConfig):
        return None
    for name, (field, option) in OVERRIDES.items():
        chosen = launcher_setting(name)
        if chosen != "no":
            return (
                f"{name}={chosen}, which accelerate's configuration sets, would override {field}: "
                f"add {option} to `accelerate launch`"
            )
    if count == 1:
        return None
    if trainer.parallel is Parallel.none:
        return (
            f"trainer.parallel=none trains in one process, but {count} were started: add "
            "trainer.parallel=ddp, or start train.py without torchrun"
        )
    if trainer.batch_size % (trainer.micro_batch_size * count):
        return (
            f"trainer.batch_size={trainer.batch_size} cannot be shared by {count} processes in "
            f"micro-batches of trainer.micro_batch_size={trainer.micro_batch_size}: start a number "
            f"of processes that divides {trainer.accumulation_steps}, or choose a smaller "
            "micro-batch"
        )
    if trainer.auto_micro_batch:
        return (
            f"trainer.auto_micro_batch=true supports one process, but {count} were started, and "
            "those that do not run out of memory would wait for the others: set a smaller "
            "trainer.micro_batch_size instead"
        )
    if config.model.quantization is Quantization.int8_torchao:
        return (
            "model.quantization=int8_torchao: processes cannot exchange such weights: use int8 or "
            "nf4 with trainer.parallel=ddp, or one process"
        )
    return _not_sharded(config) if trainer.parallel is Parallel.fsdp else None


def _not_sharded(config: Config) -> str | None:
    """Return why `trainer.parallel=fsdp` is refused for a run; None if it is not."""
    method, compiled, held = config.method, config.trainer.compile, config.model.quantization
    if held is not Quantization.none:
        return (
            f"trainer.parallel=fsdp cannot divide the weights of model.quantization={held.value}: "
            "use trainer.parallel=ddp"
        )
    # No gradients of frozen weights there, and PEFT's own types were not tried.
    if method.needs_base_gradient or not isinstance(method, LoraMethodConfig):
        return (
            f"trainer.parallel=fsdp was not tried with method={method.name}: use "
            "trainer.parallel=ddp"
        )
    if compiled is not Compile.off:
        return (
            f"trainer.parallel=fsdp was not tried with trainer.compile={compiled.value}: leave it "
            "off, or use trainer.parallel=ddp"
        )
    return None


def _refuse(message: str) -> NoReturn:
    """Refuse what all processes find wrong alike: one line, not one per process."""
    if processes().is_main_process:
        sys.stderr.write(f"error: {message}\n")
    # The launcher ends the others as soon as one has exited.
    processes().wait_for_everyone()
    raise SystemExit(MISTAKE)
