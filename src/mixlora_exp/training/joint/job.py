"""One adapter among several that train together: its data, its optimizer, and how it fares."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixlora_exp.adapters.hosting import plain_parameters_of
from mixlora_exp.adapters.model import RouterReport
from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example
from mixlora_exp.data.sampler import sampler_of
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.system.device import peak_memory_bytes
from mixlora_exp.system.signals import requested
from mixlora_exp.training.checkpoints import Checkpoint, Checkpoints
from mixlora_exp.training.progress import Pace, Tenths, append_log, live_line
from mixlora_exp.training.track import Track
from mixlora_exp.training.tracking.tracking import Tracking

__all__ = ["Job", "MicroBatch", "micro_batches", "total_steps"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples of one forward pass: the `index`-th of the `group` that makes up optimizer step
    `step`, both from 0. `epoch`: epochs that are done after this step."""

    step: int
    index: int
    group: tuple[tuple[int, ...], ...]
    epoch: float

    @property
    def examples(self) -> tuple[int, ...]:
        """Their numbers in the run's training set."""
        return self.group[self.index]

    @property
    def is_last(self) -> bool:
        """Whether the optimizer steps after it."""
        return self.index + 1 == len(self.group)


def total_steps(config: Config, examples: int) -> int:
    """Optimizer steps of a run, as transformers' Trainer counts them: `max_steps`, else whole
    epochs with their incomplete last batch."""
    trainer = config.trainer
    if trainer.max_steps is not None:
        return trainer.max_steps
    micro = math.ceil(examples / trainer.micro_batch_size)
    return math.ceil(trainer.epochs * math.ceil(micro / trainer.accumulation_steps))


def micro_batches(
    config: Config, examples: Sequence[Example], done: int = 0
) -> Iterator[MicroBatch]:
    """The micro-batches of a run in their order, the same as those of a run by itself, from the
    optimizer step on that follows `done` steps."""
    trainer = config.trainer
    sampler = sampler_of(
        [len(example.input_ids) for example in examples],
        trainer.batch_size,
        config.seed,
        trainer.order,
    )
    steps, step, epoch = total_steps(config, len(examples)), 0, 0
    size, together = trainer.micro_batch_size, trainer.accumulation_steps
    while step < steps:
        sampler.set_epoch(epoch)
        order = list(sampler)
        micro = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
        for start in range(0, len(micro), together):
            group = tuple(micro[start : start + together])
            for index in range(len(group) if step >= done else 0):
                yield MicroBatch(step, index, group, epoch + (start + len(group)) / len(micro))
            step += 1
            if step == steps:
                return
        epoch += 1


@dataclass
class Job:
    """One adapter's training. `name` is the adapter's in the model, `folder` its run's.

    With `checkpoints` it goes on from the newest one, and writes one every `save_steps`.
    """

    name: str
    config: Config
    examples: Sequence[Example]
    folder: Path
    collate: Callable[[Sequence[Example]], dict[str, Any]]
    checkpoints: Checkpoints | None = None
    tracking: Tracking | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """The trained ones, by names that `plain_parameters_of` gives."""
    optimizer: Optimizer | None = None
    scheduler: LRScheduler | None = None
    step: int = 0
    failure: str | None = None
    paused: bool = False
    """The process was asked to end, and this adapter is saved."""
    steps: int = field(init=False)
    stream: DropoutStream = field(init=False)
    track: Track = field(init=False)
    pace: Pace = field(init=False)
    _tenths: Tenths = field(init=False, default_factory=Tenths)
    _resumed: Checkpoint | None = field(init=False, default=None)
    _held: list[Tensor | None] = field(init=False, default_factory=list)
    _step_loss: Tensor | float = field(init=False, default=0.0)
    _seconds_before: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.steps = total_steps(self.config, len(self.examples))
        self.stream = DropoutStream(self.config.seed)
        self.track = Track(self.config.trainer.logging_steps)
        self.pace = Pace(lambda: int(self.track.tokens))
        size = self.config.trainer.micro_batch_size
        self._resumed = None if self.checkpoints is None else self.checkpoints.newest(size)
        if self._resumed is not None:
            self.step = self._resumed.step

    @property
    def running(self) -> bool:
        """Whether it still takes part."""
        return self.failure is None and not self.paused and self.step < self.steps

    def adopt(self, model: nn.Module) -> None:
        """Find the adapter's trained parameters in `model`, and take over what the checkpoint that
        was found has of them and of the log."""
        owned = plain_parameters_of(model, self.name)
        self.parameters = {name: p for name, p in owned.items() if p.requires_grad}
        if self._resumed is not None:
            self._resumed.restore_weights(self.parameters)
            state = self._resumed.state
            self.track.load(state["track"], state["seconds"])
            self._seconds_before = state["seconds"]

    def prepare(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Train with these, in the state of the checkpoint if there is one."""
        if not self.running:
            self._resumed = None
            return
        self.optimizer, self.scheduler = optimizer, scheduler
        self.pace.begin(self.step)
        if self._resumed is not None:
            self._resumed.restore(self.parameters, optimizer, scheduler)
            self._resumed = None

    def fail(self, reason: str) -> None:
        """Take it out of the batch; the others go on."""
        self.failure = reason
        self.release()
        sys.stderr.write(f"error: {self.folder.name}: {reason}\n")

    def release(self) -> None:
        """Give back what only training needs."""
        self.optimizer = self.scheduler = None
        self._held = []
        for parameter in self.parameters.values():
            parameter.grad = None

    def note_pass(
        self, loss: Tensor, report: RouterReport | None, tokens: int, share: Tensor
    ) -> None:
        """Note one micro-batch, with its share of the label tokens of the optimizer step."""
        self._step_loss = self._step_loss + loss.detach()
        self.track.note_pass(report, tokens, share)

    def hold_gradients(self) -> None:
        """Keep this micro-batch's gradients where the Trainer, which clears them after every pass,
        does not find them."""
        self.take_gradients()
        self._held = [parameter.grad for parameter in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.grad = None

    def take_gradients(self) -> None:
        """Add the gradients of the step's earlier micro-batches to those of the last one."""
        for parameter, held in zip(self.parameters.values(), self._held, strict=False):
            if held is None:
                continue
            parameter.grad = held if parameter.grad is None else parameter.grad.add_(held)
        self._held = []

    def note_step(self, norm: float) -> bool:
        """Note the whole step's loss and gradient norm; whether both are numbers."""
        loss, self._step_loss = float(self._step_loss), 0.0
        return self.track.watch.add(loss, norm)

    def finish_step(self, norm: float, rate: float, epoch: float, seconds: float) -> None:
        """Count the step; log and save if it is time to. `seconds`: since this start."""
        self.step += 1
        self.track.seconds = self._seconds_before + seconds
        if self.checkpoints is not None:
            self.checkpoints.check_owner()
        if self.step % self.track.every == 0:
            self._log(norm, rate, epoch)
        done = self.step == self.steps
        if self.checkpoints is not None and (
            done or requested() or self.step % self.config.trainer.save_steps == 0
        ):
            self.checkpoints.save(
                self.step,
                self.parameters,
                self.optimizer,
                self.scheduler,
                {
                    "track": self.track.state(),
                    "seconds": self.track.seconds,
                    "micro_batch_size": self.config.trainer.micro_batch_size,
                },
            )
        self.paused = requested()
        if done:
            self.release()

    def _log(self, norm: float, rate: float, epoch: float) -> None:
        figures, load = self.track.entry(self.step)
        loss, speed = figures.pop("loss"), self.pace.look()
        entry = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": epoch, **figures}
        self.track.curve.append({**entry, "step": self.step})
        shown = entry if load is None else {**entry, "expert_load": load}
        append_log(self.folder / "train_log.jsonl", {"step": self.step, **shown})
        if self.tracking is not None:
            device = next(iter(self.parameters.values())).device
            memory = peak_memory_bytes(device) / 2**30
            extra = {"tokens_per_second": speed, "memory_gib": memory}
            self.tracking.log(self.step, {**shown, **extra})
        if sys.stderr.isatty() or self._tenths.due(self.step, self.steps):
            left = self.pace.left(self.step, self.steps)
            line = live_line(self.step, self.steps, entry, speed, left)
            sys.stderr.write(f"  {self.folder.name} {line}\n")
