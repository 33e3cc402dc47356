"""Assigns examples to the optimizer steps of a run, in advance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example
from mixlora_exp.data.sampler import sampler_of


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples of one forward pass, as indices into the training set. `first`: number of examples
    of the same optimizer step before them. `repeated`: another process has the same micro-batch,
    and this one counts for nothing."""

    examples: tuple[int, ...]
    first: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """The micro-batches of one process; `epoch`: epochs completed after this step (fractional);
    `parts`: number of micro-batches of all processes without repeated ones."""

    micro_batches: tuple[MicroBatch, ...]
    epoch: float
    parts: int


def total_steps(config: Config, examples: int) -> int:
    """Optimizer steps of a run: `max_steps`, or all epochs including incomplete last batches."""
    trainer = config.trainer
    if trainer.max_steps is not None:
        return trainer.max_steps
    micro = math.ceil(examples / trainer.micro_batch_size)
    return math.ceil(trainer.epochs * math.ceil(micro / trainer.accumulation_steps))


def optimizer_steps(
    config: Config, examples: Sequence[Example], process: int = 0, processes: int = 1
) -> list[OptimizerStep]:
    """Return the optimizer steps of `process`, in order; a function of the configuration and the
    lengths.

    The micro-batches of a step are dealt to the `processes` in turn. All get the same number, since
    they sum their gradients together: at the end of an epoch, some repeat the step's first one.
    """
    trainer, found, epoch = config.trainer, [], 0
    size, together = trainer.micro_batch_size, trainer.accumulation_steps
    lengths = [len(example.input_ids) for example in examples]
    sampler = sampler_of(lengths, trainer.batch_size, config.seed, trainer.order)
    steps = total_steps(config, len(examples))
    while len(found) < steps:
        sampler.set_epoch(epoch)
        order = list(sampler)
        micro = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
        for start in range(0, len(micro), together):
            group = micro[start : start + together]
            done = epoch + (start + len(group)) / len(micro)
            # Only the last micro-batch of an epoch may be smaller.
            parts = [MicroBatch(part, i * size) for i, part in enumerate(group)]
            parts += [replace(parts[0], repeated=True)] * (-len(group) % processes)
            found.append(OptimizerStep(tuple(parts[process::processes]), done, len(group)))
        epoch += 1
    return found[:steps]
