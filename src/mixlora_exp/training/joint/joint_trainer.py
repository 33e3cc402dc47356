"""The transformers Trainer over passes in which several adapters share the frozen model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from math import isfinite
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, get_scheduler

from mixlora_exp.adapters.hosting import parameters_of
from mixlora_exp.config.choices import Head
from mixlora_exp.errors import UserError
from mixlora_exp.models.precision import autocast
from mixlora_exp.training.joint.job import Job, MicroBatch, micro_batches
from mixlora_exp.training.joint.joint import joint_losses, total_of
from mixlora_exp.training.joint.packed import packed_attention
from mixlora_exp.training.stability import Diverged, find_layer

__all__ = ["JointTrainer", "passes_of"]

Pass = dict[str, MicroBatch]


def passes_of(jobs: Sequence[Job]) -> list[Pass]:
    """Which micro-batch of which adapter goes through the model in each pass: the next one of every
    adapter that is not done, so that each keeps its own batch size and order."""
    columns = [micro_batches(job.config, job.examples, job.step) for job in jobs]
    return [
        {job.name: micro for job, micro in zip(jobs, row, strict=True) if micro is not None}
        for row in zip_longest(*columns)
    ]


class _JointOptimizer(Optimizer):
    """Steps the optimizer of each adapter whose optimizer step is complete after a pass."""

    def __init__(self, trainer: JointTrainer) -> None:
        self.trainer = trainer
        super().__init__([p for job in trainer.jobs for p in job.parameters.values()], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        self.trainer.finish_pass()


class JointTrainer(Trainer):
    """Trains several adapters of one `PeftModel` (of the MixLoRA tuner) in the same passes.

    Every adapter has its own batches, loss, optimizer, schedule, clipping, dropout stream and
    number of steps, all as in a run of its own; a pass is one step of the Trainer. An adapter whose
    loss or gradient is no number is taken out, and the others do not notice.
    """

    def __init__(
        self,
        model: PeftModel,
        jobs: Sequence[Job],
        arguments: Mapping[str, TrainingArguments],
        args: TrainingArguments,
        head: Head,
        dtype: torch.dtype,
    ) -> None:
        self.jobs = list(jobs)
        self._by_name = {job.name: job for job in jobs}
        self._arguments = arguments
        self._head, self._dtype = head, dtype
        self._items: dict[str, Tensor] = {}
        self._pass: Pass = {}
        self._started = time.perf_counter()
        passes = passes_of(jobs)
        args.max_steps = len(passes)
        super().__init__(model=model, args=args, train_dataset=passes, data_collator=self._collate)

    # The Trainer sees passes: they come in order, are not counted in tokens and have no labels.

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    def _collate(self, rows: Sequence[Pass]) -> dict[str, Any]:
        (found,) = rows
        made: dict[str, Any] = {"passes": found}
        for name, micro in found.items():
            job = self._by_name[name]
            if job.failure is None:
                made[name] = job.collate([job.examples[i] for i in micro.examples])
        return made

    def create_optimizer(self, model=None) -> Optimizer:
        decayed = set(self.get_decay_parameter_names(self.model))
        for job in self.jobs:
            arguments = self._arguments[job.name]
            kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, self.model)
            names = {id(p): name for name, p in parameters_of(self.model, job.name).items()}
            groups = [
                {
                    "params": [
                        p for p in job.parameters.values() if (names[id(p)] in decayed) is decay
                    ],
                    "weight_decay": arguments.weight_decay if decay else 0.0,
                }
                for decay in (True, False)
            ]
            optimizer = kind(groups, **options)
            scheduler = get_scheduler(
                arguments.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=arguments.get_warmup_steps(job.steps),
                num_training_steps=job.steps,
            )
            job.prepare(optimizer, scheduler)
        self.optimizer = _JointOptimizer(self)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        # Each adapter has its own; the Trainer wants one for the passes.
        self.lr_scheduler = LambdaLR(self.optimizer, lambda _: 1.0)
        return self.lr_scheduler

    def train(self, *args: Any, **kwargs: Any):
        row_map = self.model.base_model.row_map
        self._started = time.perf_counter()
        try:
            with packed_attention(self.model.base_model.model) as self._attention:
                return super().train(*args, **kwargs)
        finally:
            row_map.use()

    def _running(self, inputs: Mapping[str, Any]) -> Iterator[tuple[Job, MicroBatch, Any]]:
        for name, micro in inputs["passes"].items():
            job = self._by_name[name]
            if job.running:
                yield job, micro, inputs[name]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        model.train()
        self._pass, batches = {}, {}
        for job, micro, batch in self._running(inputs):
            self._pass[job.name] = micro
            job.stream.step, job.stream.micro_batch = micro.step, micro.index
            batches[job.name] = self._prepare_inputs(batch)
            if micro.index == 0:
                self._items[job.name] = self._items_of(job, micro)
        if not batches:
            self.control.should_training_stop = True
            return torch.zeros((), device=self.args.device)
        with autocast(self.args.device, self._dtype):
            losses = joint_losses(self.model, batches, self._items, self._head, self._attention)
        total = total_of(losses)
        self.accelerator.backward(total)
        reports = self.model.base_model.router_reports
        for name, loss in losses.items():
            batch = batches[name]
            real = int(batch["attention_mask"].sum())
            share = (batch["labels"][..., 1:] != -100).sum() / self._items[name]
            self._by_name[name].note_pass(loss, reports.get(name), real, share)
        return total.detach()

    def _items_of(self, job: Job, first: MicroBatch) -> Tensor:
        """Label tokens of the whole optimizer step that begins with `first`."""
        batches = (job.collate([job.examples[i] for i in part]) for part in first.group)
        total = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in batches)
        return torch.tensor(total, device=self.args.device)

    def finish_pass(self) -> None:
        """After the backward pass: an optimizer step for those whose last micro-batch it was."""
        for name, micro in self._pass.items():
            job = self._by_name[name]
            if not micro.is_last:
                job.hold_gradients()
                continue
            job.take_gradients()
            gradients = [p.grad for p in job.parameters.values() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            if not job.note_step(norm):
                loss = job.track.watch.losses[-1]
                where, usable = self._where(job, micro), isfinite(loss)
                error = Diverged(job.step + 1, loss, norm, where, usable=usable)
                job.fail(self.diverged(job, error))
                continue
            limit = self._arguments[name].max_grad_norm
            if limit:
                nn.utils.clip_grad_norm_(job.parameters.values(), limit)
            job.optimizer.step()
            rate = job.scheduler.get_last_lr()[0]
            job.scheduler.step()
            for parameter in job.parameters.values():
                parameter.grad = None
            if job.step + 1 == job.steps and not self._gives_numbers(job, micro):
                where, step = self._where(job, micro), job.step + 2
                error = Diverged(step, float("nan"), norm, where, usable=False, last=True)
                job.fail(self.diverged(job, error))
                continue
            try:
                job.finish_step(norm, rate, micro.epoch, time.perf_counter() - self._started)
            except UserError as error:
                # A disk that is full, or a run that another process has: the others' may go on.
                job.fail(str(error))

    def _alone(self, job: Job, batch: Mapping[str, Any]) -> Tensor:
        """The loss over rows of one adapter."""
        with autocast(self.args.device, self._dtype):
            return joint_losses(
                self.model, {job.name: batch}, self._items, self._head, self._attention
            )[job.name]

    def _batches(self, job: Job, micro: MicroBatch) -> Iterator[Mapping[str, Any]]:
        for part in micro.group:
            yield self._prepare_inputs(job.collate([job.examples[i] for i in part]))

    @torch.no_grad()
    def _gives_numbers(self, job: Job, micro: MicroBatch) -> bool:
        """Whether the loss over the last step's rows still is a number after it: no other step
        looks."""
        return all(isfinite(self._alone(job, batch)) for batch in self._batches(job, micro))

    def _where(self, job: Job, micro: MicroBatch) -> str:
        """The layer in which numbers stop being such, over the rows of one adapter alone."""
        batches = self._batches(job, micro)
        try:
            return find_layer(
                self.model, batches, lambda batch: self._alone(job, batch), job.parameters
            )
        except RuntimeError as error:
            return f"the layer was not found: {str(error).splitlines()[0][:80]}"

    def diverged(self, job: Job, error: Diverged) -> str:
        """What is told of an adapter that is taken out; the others' runs do not depend on it."""
        return str(error)
