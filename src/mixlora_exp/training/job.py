"""The training state of one adapter: data, weights, progress. Jobs in one loop share none of it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.adapters.mixed_adapters import parameters_of, plain_parameters_of
from mixlora_exp.adapters.router_report import RouterReport, counted_shape
from mixlora_exp.config.schema import Config, LoraMethodConfig
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.system.device import processes, summed
from mixlora_exp.system.signals import requested
from mixlora_exp.training.checkpoint_content import check_content
from mixlora_exp.training.checkpoints import Checkpoint, Checkpoints
from mixlora_exp.training.compiled import pad_to
from mixlora_exp.training.hooks import Hook, hook_of
from mixlora_exp.training.last_layer import KeptRows
from mixlora_exp.training.packed import examples_of
from mixlora_exp.training.run_statistics import Track
from mixlora_exp.training.steps import OptimizerStep, optimizer_steps

Batch = Mapping[str, Any]
OWN = ("example", "step", "weight")
"""Entries of a batch beside the model's inputs: the number of each example in its optimizer step,
the step, and 0 if another process has the same batch (see `MicroBatch`), else 1."""


@dataclass(kw_only=True)
class Job:
    """One adapter's training. `name`: the adapter's name in the model; `folder`: its run's folder.

    With `checkpoints` it resumes from the newest one, and writes one every `save_steps`. `watch` is
    called with step and loss (without router loss) of every log entry, and may raise to end the
    training.
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
    """Completed optimizer steps."""
    failure: UserError | None = None
    """Reason why this adapter's training failed; the other adapters continue."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """The trained parameters, by the names of `plain_parameters_of`."""
    batches: list[Batch] = field(default_factory=list)
    """Micro-batches of the current optimizer step."""
    last_batches: list[Batch] = field(default_factory=list)
    """Micro-batches of the previous optimizer step, whose loss was finite."""
    norm: float = 0.0
    """Gradient norm before clipping in the last step."""
    expert_load: list[list[float]] | None = None
    """(layers, E): share of each expert since the previous log entry."""
    kept: KeptRows | None = None
    """The rows that the last layer computes alone, if it does so."""
    hook: Hook = field(default_factory=Hook)
    plan: list[OptimizerStep] = field(init=False)
    stream: DropoutStream = field(init=False)
    track: Track = field(init=False)
    seconds_before: float = field(init=False, default=0.0)
    not_chosen: dict[str, list[int]] | None = field(init=False, default=None)
    """Result of `gradient_check.check_gradients_flow` before the first step; None until then."""
    kept_bytes_per_token: float | None = field(init=False, default=None)
    """Bytes that autograd kept then for the backward pass, per position."""
    first_step_seconds: float | None = field(init=False, default=None)
    """Seconds of this process's first step, compilation included."""
    _resumed: Checkpoint | None = field(init=False, default=None)
    _step_loss: Tensor | float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        state = processes()
        this, count = state.process_index, state.num_processes
        self.plan = optimizer_steps(self.config, self.examples, this, count)
        self.stream = DropoutStream(self.config.seed)
        self.track = Track(self.config.trainer.logging_steps, summed)
        size = self.config.trainer.micro_batch_size
        self._resumed = None if self.checkpoints is None else self.checkpoints.newest(size)
        if self._resumed is not None:
            self.step = self._resumed.step

    @property
    def steps(self) -> int:
        """Total optimizer steps of the run."""
        return len(self.plan)

    @property
    def running(self) -> bool:
        """True if this adapter is still training."""
        return self.failure is None and self.step < self.steps

    def adopt(self, model: nn.Module) -> None:
        """Find the adapter's trained parameters in `model`, connect its dropout to its own stream,
        and restore weights and log from the checkpoint, if there is one.

        Raises:
            UserError: the checkpoint has content that this run cannot have written.
        """
        use_dropout_stream(model, self.name, self.stream)
        if isinstance(self.config.method, LoraMethodConfig):
            for name, parameter in parameters_of(model, self.name).items():
                frozen = "lora_magnitude" in name and not self.config.method.train_magnitude
                frozen |= "lora_A" in name and self.config.method.lora_fa
                parameter.requires_grad_(not frozen)
        owned = plain_parameters_of(model, self.name)
        self.parameters = {name: p for name, p in owned.items() if p.requires_grad}
        self.hook = hook_of(model, self.name, self.config, self.steps)
        if self._resumed is not None:
            muon = self.config.trainer.optim == "muon"
            counted = counted_shape(model, self.name)
            check_content(self._resumed, self.parameters, self.steps, counted=counted, muon=muon)
            first = processes().is_main_process
            if first and self.running:
                text = f"resuming after step {self.step} of {self.steps}"
                sys.stderr.write(f"  {self.folder.name}: {text}\n")
            self._resumed.restore_weights(self.parameters)
            self.hook.resume(self.parameters, self._resumed.moments)
            state = self._resumed.state
            self.track.load(state["track"], state["seconds"], first=first)
            self.seconds_before = state["seconds"]
            self.not_chosen = state.get("not_chosen")
            self.kept_bytes_per_token = state.get("kept_bytes_per_token")

    def restore_moments(self, optimizer: Optimizer) -> None:
        """Restore the optimizer's state from the checkpoint, if there is one."""
        if self._resumed is not None:
            self._resumed.restore_moments(self.parameters, optimizer)
            self._resumed = None

    def collated(self, step: int, number: int, of: int) -> Batch | None:
        """Return the micro-batch for pass `number` (from 0) of the `of` passes of optimizer step
        `step`; None if there is none. A step with fewer micro-batches uses the last passes."""
        if step >= self.steps or step < self.step or self.failure is not None:
            return None
        parts = self.plan[step].micro_batches
        index = number - of + len(parts)
        if index < 0:
            return None
        part = parts[index]
        batch = self.collate([self.examples[i] for i in part.examples], part.first)
        return {**batch, "weight": float(not part.repeated)}

    def begin_pass(self, step: int, batch: Batch) -> Batch:
        """Store a micro-batch and name its rows to the dropout stream; the model's inputs."""
        batch = {**batch, "step": step}
        self.batches.append(batch)
        return self.inputs_of(batch)

    def inputs_of(self, batch: Batch) -> Batch:
        """Return the model's inputs of a stored batch, whose rows become those of the dropout
        stream."""
        example, mask, ids = (batch[n] for n in ("example", "attention_mask", "position_ids"))
        if "unpack" in batch:
            position = ids
            rows = example.to(ids.device)[examples_of(ids)]
        else:
            # Positions that go on through padding: each example's rows are then one run of them.
            first = mask.argmax(dim=1, keepdim=True)
            columns = torch.arange(mask.shape[1], device=mask.device)
            position = columns - first + ids.gather(1, first)
            rows = example.to(mask.device).repeat_interleave(mask.shape[1])
        kept = self.kept and self.kept.use(mask.shape, batch.get("logits_to_keep"))
        self.stream.begin(batch["step"], rows, position.flatten(), kept)
        if not isinstance(self.config.method, LoraMethodConfig):
            # PEFT's other types draw from torch's generator, which a resumed run must find alike.
            torch.manual_seed(self._seed_of(batch["step"], int(example[0])))
        return {name: value for name, value in batch.items() if name not in OWN}

    def _seed_of(self, step: int, example: int) -> int:
        text = f"{self.config.seed} {step} {example}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

    def note_pass(self, loss: Tensor, report: RouterReport | None, share: Tensor) -> None:
        """Add the last micro-batch's loss and router statistics. share: its fraction of the
        optimizer step's label tokens."""
        batch = self.batches[-1]
        weight = batch["weight"]
        self._step_loss = self._step_loss + loss.detach()
        if report is not None and not weight:
            # All the same: every process must have counts to sum.
            report = RouterReport(report.loss, report.counts * 0)
        tokens = batch["attention_mask"].sum() * int(weight)
        self.track.note_pass(report, tokens, share * weight)

    def take_step_loss(self) -> Tensor:
        """Return the loss of the whole optimizer step, on the device; the next one's starts from
        0."""
        loss, self._step_loss = torch.as_tensor(self._step_loss), 0.0
        return loss

    def note_step(self, loss: float, norm: float) -> bool:
        """Note the whole step's loss and gradient norm; whether both are finite."""
        self.norm = norm
        return self.track.watch.add(loss, norm)

    def clear_gradients(self) -> None:
        """Set all gradients to None, so that the optimizer skips the parameters."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def fail(self, error: UserError) -> None:
        """Stop training this adapter because of `error`; the others continue."""
        self.failure = error
        self.batches, self.last_batches = [], []
        self.clear_gradients()

    @property
    def logs(self) -> bool:
        """Return whether to log the last completed step."""
        return self.step % self.track.every == 0

    def save_due(self, asked_to_end: bool) -> bool:
        """Return whether to write a checkpoint after the last completed step, or to tell that a
        run which is asked to end has none."""
        trainer = self.config.trainer
        if self.checkpoints is None or not trainer.optimizer.resumes:
            return self.checkpoints is not None and asked_to_end
        return self.step == self.steps or asked_to_end or self.step % trainer.save_steps == 0

    def save(self, optimizer: Optimizer, *, first: bool) -> None:
        """Write a checkpoint; all processes contribute, and the `first` one writes it, and tells
        the step if the run is about to end. An optimizer without checkpoints: only tell.

        Raises:
            UserError: the disk is full, or another process has taken over the run.
        """
        trainer = self.config.trainer
        if not trainer.optimizer.resumes:
            if first:
                at = f"step {self.step} of {self.steps} is not saved"
                why = f"trainer.optim={trainer.optim} has no checkpoints"
                sys.stderr.write(
                    f"  {self.folder.name}: {at}: {why}; it starts from the beginning\n"
                )
            return
        state = {
            "track": self.track.state(),
            "seconds": self.track.seconds,
            "micro_batch_size": self.config.trainer.micro_batch_size,
            "not_chosen": self.not_chosen,
            "kept_bytes_per_token": self.kept_bytes_per_token,
        }
        if first and self.checkpoints is not None:
            self.checkpoints.save(self.step, self.parameters, optimizer, state)
            if requested():
                at = f"saved after step {self.step} of {self.steps}"
                sys.stderr.write(f"  {self.folder.name}: {at}; the same command resumes there\n")


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
    """Create the job that `config` describes; see `Job` for the arguments.

    Raises:
        UserError: there are no examples.
    """
    if not examples:
        raise UserError(
            f"task.train={config.task.train} has no training examples: choose another task or data"
        )
    collate = Collator(
        tokenizer.pad_token_id,
        config.trainer.loss_on,
        config.trainer.padding_in_loss,
        tokenizer.padding_side,
        pad_to(config),
        tuple(getattr(config.method, "type1_tasks", ())),
        config.data.packing,
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


class Collate:
    """Maps the number of a pass to the micro-batches of the adapters that have rows in it."""

    def __init__(self, jobs: Sequence[Job], passes: int) -> None:
        self._jobs, self._passes = jobs, passes

    def __call__(self, numbers: Sequence[int]) -> dict[str, Batch]:
        """Return the micro-batch of each adapter in pass `numbers[0]`, without those that have
        none."""
        step, number = divmod(numbers[0], self._passes)
        found = {job.name: job.collated(step, number, self._passes) for job in self._jobs}
        return {name: batch for name, batch in found.items() if batch is not None}
