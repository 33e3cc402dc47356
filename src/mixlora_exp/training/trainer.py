"""The training loop for one or several adapters: transformers' Trainer over forward passes in which
the adapters share the frozen model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import isfinite
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from mixlora_exp.adapters import save_adapter
from mixlora_exp.adapters.mixed_adapters import expert_parameters_of
from mixlora_exp.config.choices import Compile
from mixlora_exp.config.schema import LoraMethodConfig
from mixlora_exp.errors import UserError
from mixlora_exp.models.precision import autocast
from mixlora_exp.system.device import summed
from mixlora_exp.system.signals import request, requested
from mixlora_exp.training.compiled import compiled_layers
from mixlora_exp.training.gradient_check import check_gradients_flow
from mixlora_exp.training.graph_step import GraphStep, graph_step
from mixlora_exp.training.job import Batch, Collate, Job
from mixlora_exp.training.last_good import diverged_message, keep_last_good
from mixlora_exp.training.last_layer import last_layer_at_kept_rows
from mixlora_exp.training.losses import joint_losses, label_count, single_loss, total_of
from mixlora_exp.training.packed import packed_attention
from mixlora_exp.training.parameter_groups import optimizer_of, parameter_groups, schedule_of
from mixlora_exp.training.router_decisions import predicting, routers_watched
from mixlora_exp.training.saved_bytes import counting_saved, storages_of
from mixlora_exp.training.sharding import sharded
from mixlora_exp.training.stability import Diverged, find_layer
from mixlora_exp.training.step_events import StepEvents


class MixLoraTrainer(Trainer):
    """Trains the adapters of a `PeftModel` named by `jobs`, one or several.

    Every adapter has its own batches, loss, learning rate, schedule, clipping, dropout stream and
    number of steps, as in a separate run. The Trainer's step `n` is optimizer step `n` of every
    adapter. An adapter that has finished, or is ahead of the others after a resume, has no rows in
    a step and hence no gradient. An adapter whose loss or gradient is not finite stops with a
    reason (`Job.failure`), without affecting the others.
    """

    def __init__(
        self, *, model: PeftModel, jobs: Sequence[Job], args: TrainingArguments, dtype: torch.dtype
    ) -> None:
        self.jobs = {job.name: job for job in jobs}
        under_way = [job for job in jobs if job.running]
        self.first = min(job.step for job in under_way)
        self.steps = max(job.steps for job in under_way)
        args.max_steps = self.steps - self.first
        self._dtype, self._head = dtype, jobs[0].config.trainer.head
        self._compile = jobs[0].config.trainer.compile
        self._optim = jobs[0].config.trainer.optim
        self._sharded = sharded(jobs[0].config)
        self._schedules: dict[str, Callable[[int], float]] = {}
        self._items: dict[str, Tensor] = {}
        self._stepped: list[Job] = []
        self._asked = False
        self._proven: set[str] = set()
        self._graph: GraphStep | None = None
        self._attention = ""
        self._started = time.perf_counter()
        super().__init__(model=model, args=args)
        self.loss_is_scaled_for_ga = True
        self.add_callback(StepEvents(self))

    # The batches of each forward pass.

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader that yields, per forward pass, the next micro-batch of every adapter."""
        count = self.args.gradient_accumulation_steps
        loader = DataLoader(
            range(self.first * count, self.steps * count),
            batch_size=1,
            collate_fn=Collate(list(self.jobs.values()), count),
            pin_memory=self.args.dataloader_pin_memory,
        )
        # Jobs already divide the data among processes, so accelerate must not.
        return prepare_data_loader(
            loader, self.args.device, 1, 0, put_on_device=True, non_blocking=True
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Batch]], dict[str, Tensor]]:
        """Return an optimizer step's passes, and each adapter's number of label tokens in it."""
        passes, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items: dict[str, Tensor] = {}
        for name, batch in (pair for batches in passes for pair in batches.items()):
            items[name] = items.get(name, 0) + label_count(batch) * int(batch["weight"])
        return passes, {name: summed(count) for name, count in items.items()}

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the Trainer's estimate does not hold for adapters."""
        return 0

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Compute the loss of one pass, a scalar, and its gradients; before the first pass run the
        hooks' `begin` and check that every parameter gets a gradient."""
        self._items = num_items_in_batch
        running = {name: batch for name, batch in inputs.items() if self.jobs[name].running}
        fresh = running.keys() - self._proven if self.state.global_step == 0 else ()
        # An adapter with fewer micro-batches than others comes in a later pass of the step.
        for name in (name for name in running if name in fresh):
            # As in a step: else nothing is checkpointed, and these passes take more memory than it.
            self.model.train()
            job = self.jobs[name]
            job.hook.begin(partial(self._first_losses, job))
            self._prove(job, running[name])
        if fresh:
            self._proven |= fresh
            running = {name: batch for name, batch in running.items() if self.jobs[name].running}
        if not running:
            # At the end of an epoch a step may have fewer micro-batches.
            return torch.zeros((), device=self.args.device)
        if self._graph is not None:
            batches = self._prepare_inputs(running)
            return self._graph(self.state.global_step, batches, num_items_in_batch)
        return super().training_step(model, running, num_items_in_batch)

    def _first_losses(self, job: Job) -> Iterator[Tensor]:
        """Yield the losses of the micro-batches of a job's first step."""
        count = len(job.plan[0].micro_batches)
        for number in range(count):
            batch = self._prepare_inputs(job.collated(0, number, count))
            yield self._own_loss(job, {**batch, "step": 0})

    def _prove(self, job: Job, batch: Batch) -> None:
        """Stop an adapter that has parameters without a gradient, before its first step."""
        if not isinstance(job.config.method, LoraMethodConfig):
            # What PEFT's own types drop can be a whole layer, which then has no gradient.
            for module in self.model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.eval()
        experts = expert_parameters_of(self.model, job.name)
        # Whatever the number of processes, on the step's first micro-batch alone.
        batch = {**batch, "step": 0, "weight": float(self.is_world_process_zero())}
        loss = partial(self._own_loss, job, batch)
        if self._compile is Compile.off and not self._sharded:
            # Hooks would be compiled into the layers, which are compiled again without them.
            loss = partial(self._with_saved_bytes, job, loss, batch["input_ids"].numel())
        try:
            rows = predicting(batch) & bool(batch["weight"])
            with routers_watched(self.model, job.name, rows) as decisions:
                job.not_chosen = check_gradients_flow(
                    job.parameters, experts, loss, summed, decisions
                )
        except UserError as error:
            self._fail(job, error)

    def _with_saved_bytes(self, job: Job, loss: Callable[[], Tensor], positions: int) -> Tensor:
        """Return the loss; the job notes what autograd keeps for it."""
        with counting_saved(storages_of(self.model)) as total:
            value = loss()
            job.kept_bytes_per_token = round(total() / positions, 1)
        return value

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the sum of the adapters' losses with their router losses, a scalar; each is
        divided by its label tokens in the whole step."""
        self._items = num_items_in_batch
        batches = {
            name: self.jobs[name].begin_pass(self.state.global_step, batch)
            for name, batch in inputs.items()
        }
        with ExitStack() as stack:
            for job in map(self.jobs.__getitem__, batches):
                stack.enter_context(job.hook.passing(1 / job.plan[job.step].parts))
            losses = self._losses(model, batches)
        losses = {name: loss * inputs[name]["weight"] for name, loss in losses.items()}
        reports = getattr(self.model.base_model, "router_reports", {})
        for name, loss in losses.items():
            share = label_count(batches[name]) / self._items[name]
            self.jobs[name].note_pass(loss, reports.get(name), share)
        return total_of(losses)

    def _losses(self, model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        with autocast(self.args.device, self._dtype):
            attention = self._attention
            if len(self.jobs) > 1:
                return joint_losses(self.model, batches, self._items, self._head, attention)
            ((name, batch),) = batches.items()
            base = self.model.base_model.model
            loss = single_loss(model, base, batch, self._items[name], self._head, attention)
        # DDP averages gradients, but the loss is already divided by the items of all processes.
        return {name: loss * self.args.world_size}

    def train(self, *args: Any, **kwargs: Any):
        """Run the training loop with packed attention, compiled layers or the last layer at kept
        rows."""
        base, count = self.model.base_model.model, len(self.jobs)
        if count == 1:
            (job,) = self.jobs.values()
            if self._compile is Compile.off:
                with ExitStack() as stack:
                    if job.config.data.packing:
                        self._attention = stack.enter_context(packed_attention(base))
                    job.kept = stack.enter_context(last_layer_at_kept_rows(base))
                    return super().train(*args, **kwargs)
            # Compiled, each number of kept rows would be another code.
            checkpointing = self.args.gradient_checkpointing
            with compiled_layers(base, self._compile, checkpointing=checkpointing):
                self._graph = graph_step(self.model, job, self._dtype)
                return super().train(*args, **kwargs)
        try:
            with (
                compiled_layers(base, self._compile, adapters=count),
                packed_attention(base) as self._attention,
            ):
                return super().train(*args, **kwargs)
        finally:
            self.model.base_model.row_map.use()

    # One optimizer, with separate parameter groups for each adapter.

    def create_optimizer(self, model=None) -> Optimizer:
        """Return one optimizer with parameter groups for each adapter, moments restored on
        resume."""
        decayed = set(self.get_decay_parameter_names(self.model))
        jobs = self.jobs.values()
        groups = [group for job in jobs for group in parameter_groups(self.model, job, decayed)]
        names = {id(p): name for job in jobs for name, p in job.parameters.items()}
        self.optimizer = optimizer_of(self.args, groups, names, self._optim)
        for job in self.jobs.values():
            job.restore_moments(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        """Return a scheduler that gives each adapter's groups the factor of its own schedule."""
        for group in self.optimizer.param_groups:
            group["initial_lr"] = float(group["lr"])  # Some optimizers make a tensor of it.
        for job in self.jobs.values():
            self._schedules[job.name] = schedule_of(job.config, job.steps)
        factors = [self._schedules[group["adapter"]] for group in self.optimizer.param_groups]
        self.lr_scheduler = LambdaLR(self.optimizer, factors, last_epoch=self.first - 1)
        return self.lr_scheduler

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        """Disabled: a norm over all adapters would spread NaN to each of them."""

    def check_gradients(self) -> None:
        """Store each adapter's loss and gradient norm, clip, and stop adapters with non-finite
        values, before the optimizer's step."""
        jobs = [job for job in self.jobs.values() if job.batches]
        norms = [_gradient_norm(job) for job in jobs]
        losses = [
            job.take_step_loss().to(norm.device) for job, norm in zip(jobs, norms, strict=True)
        ]
        if jobs:
            # Every process has the norms, and of the losses those of its own rows (see `_losses`).
            losses = summed(torch.stack(losses)) / self.args.world_size
        # The host waits for the device once, whatever the number of adapters.
        numbers = torch.stack([*losses, *norms]).tolist() if jobs else []
        for i, (job, norm) in enumerate(zip(jobs, norms, strict=True)):
            loss = numbers[i]
            sound = job.note_step(loss, numbers[len(jobs) + i])
            if not sound:
                usable = isfinite(loss) or self._loss_is_finite(job)
                where = self._where(job, job.batches)
                error = Diverged(job.step + 1, loss, job.norm, where, usable=usable)
                self._take_out(job, error)
                continue
            limit = job.config.trainer.max_grad_norm
            if limit:
                nn.utils.clip_grads_with_norm_(job.parameters.values(), limit, norm)
            job.hook.before_step()
            job.last_batches, job.batches = job.batches, []

    def after_optimizer(self) -> None:
        """Run the methods' hooks after the optimizer's step, before gradients are cleared."""
        done = self.state.global_step
        for job in self.jobs.values():
            if job.running and job.step == done:
                job.hook.after_step(self.optimizer, done + 1)

    def finish_step(self) -> None:
        """Count the optimizer's step, and request logging and checkpoints as due."""
        done = self.state.global_step
        self._stepped = [j for j in self.jobs.values() if j.running and j.step == done - 1]
        # If one process received a stop signal, all stop after the same step.
        self._asked = bool(summed(torch.tensor(int(requested()))))
        if self._asked and not requested():
            request()
        for job in self._stepped:
            job.step, taken = done, time.perf_counter() - self._started
            job.track.seconds = job.seconds_before + taken
            if job.first_step_seconds is None:
                job.first_step_seconds = round(taken, 3)
                job.track.note_first_step()
            if done == job.steps and not self._loss_is_finite(job):
                # No further step would check the weights after the last update.
                where = self._where(job, job.last_batches)
                error = Diverged(done + 1, float("nan"), job.norm, where, usable=False, last=True)
                self._take_out(job, error)
            elif job.checkpoints is not None and self.is_world_process_zero():
                self._try(job, job.checkpoints.check_owner)
        sound = [job for job in self._stepped if job.failure is None]
        self.control.should_log = any(job.logs for job in sound)
        self.control.should_save = any(job.save_due(self._asked) for job in sound)
        if self._asked or not any(job.running for job in self.jobs.values()):
            self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the due entries of each adapter; `adapter` in an entry is its name."""
        if "loss" not in logs:
            return  # The Trainer's own summary.
        for job in self._stepped:
            if job.failure is not None or not job.logs:
                continue
            figures, job.expert_load = job.track.entry(job.step)
            rate = job.config.trainer.learning_rate * self._schedules[job.name](job.step - 1)
            self.state.epoch = job.plan[job.step - 1].epoch
            entry = {
                "loss": figures.pop("loss"), "grad_norm": job.norm, "learning_rate": rate,
                "epoch": self.state.epoch, **figures,
            }  # fmt: skip
            job.track.curve.append({**entry, "step": job.step})
            self._try(job, partial(super().log, {**entry, "adapter": job.name}))

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint of each adapter for which one is due. The Trainer would write one of
        them all; each has a file of its own, so that it can resume alone or with others."""
        for job in self._stepped:
            if job.failure is None and job.save_due(self._asked):
                first = self.is_world_process_zero()
                self._try(job, partial(job.save, self.optimizer, first=first))

    # Failures of one adapter do not affect the others.

    def _try(self, job: Job, work: Callable[[], Any]) -> None:
        """Call `work`; a `UserError` (disk full, run taken over) ends only this job."""
        try:
            work()
        except UserError as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: UserError) -> None:
        job.fail(error)
        if len(self.jobs) > 1:
            sys.stderr.write(f"error: {job.folder.name}: {error}\n")
        if not any(other.running for other in self.jobs.values()):
            self.control.should_training_stop = True

    def _take_out(self, job: Job, error: Diverged) -> None:
        """Stop an adapter with non-finite values, and save its last good weights."""
        kept = None
        save = partial(save_adapter, self.model, adapter=job.name)
        try:
            if self.is_world_process_zero():
                kept = keep_last_good(error, job.parameters, job.checkpoints, save, job.folder)
            failure = UserError(diverged_message(job.config, error, kept))
            failure.__cause__ = error
        except UserError as other:
            failure = other
        self._fail(job, failure)

    @torch.no_grad()
    def _loss_is_finite(self, job: Job) -> bool:
        """Return whether the current weights give a finite loss on the previous step's batches,
        of all processes."""
        found = [self._own_loss(job, batch) for batch in job.last_batches]
        finite = bool(found) and all(isfinite(loss) for loss in found)
        return not summed(torch.tensor(int(not finite)))

    def _own_loss(self, job: Job, batch: Batch) -> Tensor:
        with job.hook.passing(0.0):
            loss = self._losses(self.model, {job.name: job.inputs_of(batch)})[job.name]
            return loss * batch["weight"]

    def _where(self, job: Job, batches: Sequence[Batch]) -> str:
        """Return the description of the layer with the first non-finite value, on one adapter's
        rows."""
        if self._sharded:
            return "the layer is not looked for with trainer.parallel=fsdp"
        try:
            return find_layer(self.model, batches, partial(self._own_loss, job), job.parameters)
        except RuntimeError as error:
            # The extra forward pass may run out of memory.
            return f"the layer was not found: {str(error).splitlines()[0][:80]}"


def _gradient_norm(job: Job) -> Tensor:
    """Return the L2 norm of all gradients of an adapter together, float32."""
    own = [p.grad for p in job.parameters.values() if p.grad is not None]
    return nn.utils.get_total_norm(own).float()
