"""One adapter among several that train together: its data, its optimizer, and how it fares."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixlora_exp.adapters.model import RouterReport
from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example
from mixlora_exp.data.sampler import sampler_of
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.training.progress import append_log
from mixlora_exp.training.stability import StepWatch

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


def micro_batches(config: Config, examples: Sequence[Example]) -> Iterator[MicroBatch]:
    """The micro-batches of a run in their order, the same as those of a run by itself."""
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
        groups = [tuple(micro[i : i + together]) for i in range(0, len(micro), together)]
        for done, group in enumerate(groups, start=1):
            for index in range(len(group)):
                yield MicroBatch(step, index, group, epoch + done / len(groups))
            step += 1
            if step == steps:
                return
        epoch += 1


@dataclass
class Job:
    """One adapter's training. `name` is the adapter's in the model, `folder` its run's."""

    name: str
    config: Config
    examples: Sequence[Example]
    folder: Path
    collate: Callable[[Sequence[Example]], dict[str, Any]]
    steps: int = 0
    stream: DropoutStream = field(default_factory=lambda: DropoutStream(0))
    watch: StepWatch = field(default_factory=StepWatch)
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: Optimizer | None = None
    scheduler: LRScheduler | None = None
    step: int = 0
    tokens: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    counts: Tensor | None = None
    """Tokens sent to each expert so far, (layers, E)."""
    seconds: float = 0.0
    """From the start of training until this adapter's last step."""
    _held: list[Tensor | None] = field(default_factory=list)
    _step_loss: Tensor | float = 0.0
    _log_loss: float = 0.0
    _router_loss: float = 0.0
    _router_passes: int = 0
    _window_counts: Tensor | None = None

    def __post_init__(self) -> None:
        self.steps = total_steps(self.config, len(self.examples))
        self.stream = DropoutStream(self.config.seed)

    @property
    def running(self) -> bool:
        """Whether it still takes part."""
        return self.failure is None and self.step < self.steps

    def fail(self, reason: str) -> None:
        """Take it out of the batch; the others go on."""
        self.failure = reason
        self.release()
        sys.stderr.write(f"error: {self.folder.name}: {reason}\n")

    def release(self) -> None:
        """Give back what only training needs."""
        self.optimizer = self.scheduler = None
        self._held = []
        for parameter in self.parameters:
            parameter.grad = None

    def note_pass(self, loss: Tensor, report: RouterReport | None, tokens: int) -> None:
        """Note one micro-batch."""
        self._step_loss = self._step_loss + loss.detach()
        self.tokens += tokens
        if report is not None:
            self._router_loss += float(report.loss.detach())
            self._router_passes += 1
            counts = report.counts.double()
            self._window_counts = (
                counts if self._window_counts is None else self._window_counts + counts
            )

    def hold_gradients(self) -> None:
        """Keep this micro-batch's gradients where the Trainer, which clears them after every pass,
        does not find them."""
        self.take_gradients()
        self._held = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def take_gradients(self) -> None:
        """Add the gradients of the step's earlier micro-batches to those of the last one."""
        for parameter, held in zip(self.parameters, self._held, strict=False):
            if held is None:
                continue
            parameter.grad = held if parameter.grad is None else parameter.grad.add_(held)
        self._held = []

    def note_step(self, norm: float) -> bool:
        """Note the whole step's loss and gradient norm; whether both are numbers."""
        loss, self._step_loss = float(self._step_loss), 0.0
        self._log_loss += loss
        return self.watch.add(loss, norm)

    def finish_step(self, norm: float, rate: float, epoch: float, started: float) -> None:
        """Count the step, and log if it is time to."""
        self.step += 1
        self.seconds = time.perf_counter() - started
        every = self.config.trainer.logging_steps
        if self.step % every == 0:
            self._log(norm, rate, epoch, every)
        if self.step == self.steps:
            self.fold_counts()
            self.release()

    def _log(self, norm: float, rate: float, epoch: float, every: int) -> None:
        entry: dict[str, Any] = {
            "loss": self._log_loss / every,
            "grad_norm": norm,
            "learning_rate": rate,
            "epoch": epoch,
        }
        self._log_loss = 0.0
        load = None
        if self._router_passes:
            load = self._window_counts / self._window_counts.sum(dim=-1, keepdim=True)
            entry["router_loss"] = self._router_loss / self._router_passes
            entry["expert_load_std"] = float(load.std(dim=-1, correction=0).mean())
            self.fold_counts()
        self.curve.append({**entry, "step": self.step})
        if load is not None:
            entry["expert_load"] = [[round(share, 4) for share in row] for row in load.tolist()]
        append_log(self.folder / "train_log.jsonl", {"step": self.step, **entry})
        sys.stderr.write(
            f"  {self.folder.name} step {self.step}/{self.steps}, loss {entry['loss']:.3f}\n"
        )

    def fold_counts(self) -> None:
        """Add the counts since the last log to `counts` and start a new window."""
        if self._window_counts is not None:
            self.counts = self._window_counts + (0 if self.counts is None else self.counts)
        self._router_loss, self._router_passes, self._window_counts = 0.0, 0, None
