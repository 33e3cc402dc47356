"""One adapter in training: its data, its weights, and how it fares. What several adapters of one
loop do not share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.adapters.hosting import parameters_of, plain_parameters_of
from mixlora_exp.adapters.model import RouterReport
from mixlora_exp.config.schema import Config
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.system.device import processes, summed
from mixlora_exp.training.checkpoints import Checkpoint, Checkpoints
from mixlora_exp.training.steps import OptimizerStep, optimizer_steps
from mixlora_exp.training.track import Track

__all__ = ["Job", "make_job"]

Batch = Mapping[str, Any]


@dataclass(kw_only=True)
class Job:
    """One adapter's training. `name` is the adapter's in the model, `folder` its run's.

    With `checkpoints` it resumes from the newest one, and writes one every `save_steps`. `watch` is
    told step and loss of every log entry, without router loss, and may raise to end the training.
    """

    name: str
    config: Config
    examples: Sequence[Example]
    folder: Path
    collate: Collator
    checkpoints: Checkpoints | None = None
    tracker: Any = None
    watch: Callable[[int, float], None] | None = None
    step: int = 0
    """Optimizer steps that are done."""
    failure: UserError | None = None
    """Why it was taken out; the others go on."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """The trained ones, by names that `plain_parameters_of` gives."""
    batches: list[Batch] = field(default_factory=list)
    """Of the optimizer step under way."""
    last_batches: list[Batch] = field(default_factory=list)
    """Of the step before, whose loss was a number."""
    norm: float = 0.0
    """Of the gradient before clipping, in the last step."""
    expert_load: list[list[float]] | None = None
    """Share of each expert, per layer, between the last two log entries."""
    plan: list[OptimizerStep] = field(init=False)
    stream: DropoutStream = field(init=False)
    track: Track = field(init=False)
    seconds_before: float = field(init=False, default=0.0)
    _resumed: Checkpoint | None = field(init=False, default=None)
    _step_loss: Tensor | float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        state = processes()
        this, count = state.process_index, state.num_processes
        self.plan = optimizer_steps(self.config, self.examples, this, count)
        self.stream = DropoutStream(self.config.seed, process=this)
        self.track = Track(self.config.trainer.logging_steps, summed)
        size = self.config.trainer.micro_batch_size
        self._resumed = None if self.checkpoints is None else self.checkpoints.newest(size)
        if self._resumed is not None:
            self.step = self._resumed.step

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.plan)

    @property
    def running(self) -> bool:
        """Whether it still takes part."""
        return self.failure is None and self.step < self.steps

    def adopt(self, model: nn.Module) -> None:
        """Find the adapter's trained parameters in `model`, let its dropout be drawn from its own
        stream, and take over what the checkpoint that was found has of weights and log."""
        use_dropout_stream(model, self.name, self.stream)
        for name, parameter in parameters_of(model, self.name).items():
            frozen = "lora_magnitude" in name and not self.config.method.train_magnitude
            parameter.requires_grad_(not frozen)
        owned = plain_parameters_of(model, self.name)
        self.parameters = {name: p for name, p in owned.items() if p.requires_grad}
        if self._resumed is not None:
            first = processes().is_main_process
            if first and self.running:
                told = f"resuming after step {self.step} of {self.steps}"
                sys.stderr.write(f"  {self.folder.name}: {told}\n")
            self._resumed.restore_weights(self.parameters)
            state = self._resumed.state
            self.track.load(state["track"], state["seconds"], first=first)
            self.seconds_before = state["seconds"]

    def restore_moments(self, optimizer: Optimizer) -> None:
        """Put the checkpoint's part of the optimizer's state back, if there is one."""
        if self._resumed is not None:
            self._resumed.restore_moments(self.parameters, optimizer)
            self._resumed = None

    def collated(self, step: int, number: int, of: int) -> Batch | None:
        """Its batch in the pass `number` of the `of` that make up optimizer step `step`, from 0;
        None where it has none. A step with fewer micro-batches has them in the last passes."""
        if step >= self.steps or step < self.step or self.failure is not None:
            return None
        parts = self.plan[step].micro_batches
        index = number - of + len(parts)
        if index < 0:
            return None
        part = parts[index]
        return self.collate([self.examples[i] for i in part.examples], part.first)

    def begin_pass(self, step: int, batch: Batch) -> Batch:
        """Note a batch and place the dropout stream; returns what the model takes of it.

        The masks are drawn a micro-batch at a time: `DropoutStream.rows`, which would draw them by
        example and position, takes a CPU four to twenty times as long.
        """
        self.stream.step, self.stream.micro_batch = step, len(self.batches)
        self.batches.append(batch)
        return {name: value for name, value in batch.items() if name != "example"}

    def note_pass(
        self, loss: Tensor, report: RouterReport | None, tokens: Tensor, share: Tensor
    ) -> None:
        """Note one micro-batch, with its share of the label tokens of the optimizer step."""
        self._step_loss = self._step_loss + loss.detach()
        self.track.note_pass(report, tokens, share)

    def note_step(self, norm: float) -> tuple[float, bool]:
        """Note the whole step's gradient norm; its loss, and whether both are numbers."""
        loss, self._step_loss, self.norm = float(self._step_loss), 0.0, norm
        return loss, self.track.watch.add(loss, norm)

    def clear_gradients(self) -> None:
        """A parameter without gradient is passed over by the optimizer."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def fail(self, error: UserError) -> None:
        """Take it out of the batch; the others go on."""
        self.failure = error
        self.batches, self.last_batches = [], []
        self.clear_gradients()

    @property
    def logs(self) -> bool:
        """Whether the step that is done is to be logged."""
        return self.step % self.track.every == 0

    def save_due(self, asked_to_end: bool) -> bool:
        """Whether a checkpoint is to be written after the step that is done."""
        every = self.config.trainer.save_steps
        ends = self.step == self.steps or asked_to_end
        return self.checkpoints is not None and (ends or self.step % every == 0)

    def save(self, optimizer: Optimizer, *, first: bool) -> None:
        """Write a checkpoint; every process adds its part, and the first one writes it.

        Raises:
            UserError: the disk is full, or another process has taken the run over.
        """
        state = {
            "track": self.track.state(),
            "seconds": self.track.seconds,
            "micro_batch_size": self.config.trainer.micro_batch_size,
        }
        if first and self.checkpoints is not None:
            self.checkpoints.save(self.step, self.parameters, optimizer, state)


def make_job(
    *,
    name: str,
    config: Config,
    examples: Sequence[Example],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Checkpoints | None = None,
    tracker: Any = None,
    watch: Callable[[int, float], None] | None = None,
) -> Job:
    """The training of one adapter, as `config` has it; see `Job`.

    Raises:
        UserError: there are no examples, or `batch_size` cannot be shared out over the processes.
    """
    if not examples:
        raise UserError(
            f"task.train={config.task.train}: there is nothing to train on; choose other data"
        )
    trainer, count = config.trainer, processes().num_processes
    if trainer.batch_size % (trainer.micro_batch_size * count):
        raise UserError(
            f"trainer.micro_batch_size={trainer.micro_batch_size} on {count} processes does "
            f"not divide trainer.batch_size={trainer.batch_size}: choose a smaller one"
        )
    collate = Collator(
        tokenizer.pad_token_id, trainer.loss_on, trainer.padding_in_loss, tokenizer.padding_side
    )
    return Job(
        name=name,
        config=config,
        examples=examples,
        folder=folder,
        collate=collate,
        checkpoints=checkpoints,
        tracker=tracker,
        watch=watch,
    )
