"""The transformers Trainer with length buckets and the router's figures in its log."""

from __future__ import annotations

import sys
import time
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.adapters.hosting import plain_parameters_of
from mixlora_exp.config.choices import Head, Order
from mixlora_exp.data.sampler import BucketSampler, FixedSampler, sampler_of
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.system.device import PLAIN, summed
from mixlora_exp.training.checkpoints import Checkpoint, Checkpoints
from mixlora_exp.training.head import loss_from_hidden
from mixlora_exp.training.stability import Diverged, find_layer
from mixlora_exp.training.track import Track

__all__ = ["MixLoraTrainer"]


class MixLoraTrainer(Trainer):
    """A Trainer for PEFT models; of MixLoRA it logs the router loss and the expert load.

    The router loss itself is added in the tuner's forward pass, so nothing here changes training.
    `train_dataset` must be a sequence of examples with `input_ids`.
    """

    def __init__(
        self,
        *args: Any,
        sampler_seed: int,
        head: Head = Head.auto,
        order: Order = Order.bucketed,
        checkpoints: Checkpoints | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._head = head
        self._order = order
        self._sampler_seed = sampler_seed
        self.track = Track(self.args.logging_steps, summed)
        self.expert_load: list[list[float]] | None = None
        """Share of each expert, per layer, between the last two log entries."""
        self._checkpoints = checkpoints
        self._resumed: Checkpoint | None = None
        self._started, self.seconds_before = time.perf_counter(), 0.0
        self._sampler: BucketSampler | FixedSampler | None = None
        self._stream = DropoutStream(sampler_seed, process=self.args.process_index)
        for adapter in self.model.active_adapters:
            use_dropout_stream(self.model, adapter, self._stream)
        self._step_loss: float | torch.Tensor = 0.0
        self._step_batches: list[Any] = []
        self._last_batches: list[Any] = []
        """Of the step before, whose loss was a number."""

    def _get_train_sampler(self, train_dataset=None) -> BucketSampler | FixedSampler:
        examples = train_dataset if train_dataset is not None else self.train_dataset
        # accelerate deals micro-batches out to the processes in turn.
        micro_batches = self.args.gradient_accumulation_steps * self.args.world_size
        batch = self.args.train_batch_size * micro_batches
        lengths = [len(example.input_ids) for example in examples]
        self._sampler = sampler_of(lengths, batch, self._sampler_seed, self._order)
        return self._sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tuner = self.accelerator.unwrap_model(model).base_model
        # Outputs that somebody asks for must be whole.
        head = Head.full if return_outputs else self._head
        with loss_from_hidden(tuner.model, head):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs.get("attention_mask")
        tokens = 0 if mask is None else mask.sum()
        # As the tuner weighs the router loss, which the Trainer may divide.
        share: float | torch.Tensor = 1 / self.current_gradient_accumulation_steps
        if num_items_in_batch is not None:
            share = (inputs["labels"][..., 1:] != -100).sum() / num_items_in_batch
        self.track.note_pass(getattr(tuner, "router_report", None), tokens, share)
        return result

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._stream.step = self.state.global_step
        self._stream.micro_batch = len(self._step_batches)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        self._step_batches.append(inputs)
        return loss

    def _clip_grad_norm(self, model):
        # Clipping by a norm that is no number would spread it over all gradients.
        if self.accelerator.distributed_type in PLAIN:
            self._check_step(model, None)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """The Trainer asks for it before each optimizer step, before any weight is touched.

        Raises:
            Diverged: the loss or the gradient is no finite number.
        """
        if self.accelerator.distributed_type not in PLAIN:
            # The gradients are in pieces, and only accelerate knows how to put them together.
            return self._check_step(model, super()._get_grad_norm(model, grad_norm=grad_norm))
        if grad_norm is None:
            return self._check_step(model, None)
        # Checked before it was clipped.
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _check_step(self, model, norm: float | torch.Tensor | None) -> float:
        """Note the step's loss and gradient norm, and stop at what is no number."""
        if norm is None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        # The one synchronisation with the device in a step.
        loss, norm = float(self._step_loss), float(norm)
        batches, self._step_loss, self._step_batches = self._step_batches, 0.0, []
        sound = self.track.watch.add(loss, norm)
        # Of several processes all see the same norm, and each a loss of its own.
        if not sound and (self.args.world_size == 1 or not isfinite(norm)):
            where = self._where(batches)
            usable = isfinite(loss) or self._loss_is_sound(self._last_batches)
            raise Diverged(self.state.global_step + 1, loss, norm, where, usable=usable)
        self._last_batches = batches
        return norm

    def _alone(self) -> bool:
        return self.args.world_size == 1 and self.accelerator.distributed_type in PLAIN

    def _where(self, batches: list[Any]) -> str:
        prepared = [self._prepare_inputs(batch) for batch in batches]
        try:
            return find_layer(self.accelerator.unwrap_model(self.model), prepared)
        except RuntimeError as error:
            # It computes all logits, for which memory may not suffice.
            return f"the layer was not found: {str(error).splitlines()[0][:80]}"

    @torch.no_grad()
    def _loss_is_sound(self, batches: list[Any]) -> bool:
        """Whether the loss over `batches`, if there are any, is a number with these weights."""
        if not batches or not self._alone():
            return False
        tuner, losses = self.accelerator.unwrap_model(self.model).base_model, []
        for batch in batches:
            with self.compute_loss_context_manager(), loss_from_hidden(tuner.model, self._head):
                losses.append(float(super().compute_loss(self.model, self._prepare_inputs(batch))))
        return all(map(isfinite, losses))

    def check_end(self) -> None:
        """Look once more after the last step, which no other step looks at.

        Raises:
            Diverged: it left weights with which the loss is no number.
        """
        if self._last_batches and self._alone() and not self._loss_is_sound(self._last_batches):
            where, step = self._where(self._last_batches), self.state.global_step + 1
            raise Diverged(step, float("nan"), 0.0, where, usable=False, last=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            figures, self.expert_load = self.track.entry(self.state.global_step)
            if self.args.world_size > 1:
                # Of this process alone; the Trainer has asked the others.
                del figures["loss"]
            logs |= figures
        super().log(logs, start_time)

    # Checkpoints: what the Trainer writes and reads is replaced, when it does so is not.

    def train_or_resume(self, steps: int) -> None:
        """Train all of `steps` optimizer steps, those after the newest checkpoint if there is one.

        Raises:
            UserError: the checkpoint belongs to other data, code or settings.
        """
        size = self.args.per_device_train_batch_size
        found = None if self._checkpoints is None else self._checkpoints.newest(size)
        if found is None:
            self.train()
            return
        first = self.is_world_process_zero()
        if first:
            sys.stderr.write(f"  going on after step {found.step} of {steps}\n")
        self.track.load(found.state["track"], found.state["seconds"], first=first)
        self.seconds_before = found.state["seconds"]
        reached = TrainerState(
            global_step=found.step,
            log_history=list(self.track.curve),
            train_batch_size=self.args.train_batch_size,
            max_steps=self.args.max_steps,
            logging_steps=self.args.logging_steps,
            save_steps=self.args.save_steps,
        )
        if found.step == steps:
            # The Trainer would begin another step before it looks.
            self.state = reached
            found.restore_weights(self.trained())
            return
        self._resumed = found
        place = Path(self.args.output_dir) / "resumed"
        place.mkdir(parents=True, exist_ok=True)
        reached.save_to_json(str(place / TRAINER_STATE_NAME))
        self.train(resume_from_checkpoint=str(place))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's trained parameters by the names that checkpoints have."""
        model = self.accelerator.unwrap_model(self.model)
        owned = plain_parameters_of(model, model.active_adapter)
        return {name: parameter for name, parameter in owned.items() if parameter.requires_grad}

    def _run_epoch(self, model, epoch, *args: Any, **kwargs: Any):
        # Where batches are skipped, the loader's own call does not reach the sampler.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Weights come back together with the optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if self._resumed is not None:
            optimizer, scheduler = self._inner()
            self._resumed.restore(self.trained(), optimizer, scheduler)
            self._resumed = None

    def _load_rng_state(self, checkpoint) -> None:
        """Nothing in training draws from a global generator."""

    def _load_scaler(self, checkpoint) -> None:
        """There is none: training runs in bf16 or float32."""

    def _inner(self) -> tuple[Optimizer, LRScheduler]:
        """Optimizer and scheduler without accelerate's wrappers."""
        return (
            getattr(self.optimizer, "optimizer", self.optimizer),
            getattr(self.lr_scheduler, "scheduler", self.lr_scheduler),
        )

    def _save_checkpoint(self, model, trial) -> None:
        if self._checkpoints is None:
            return
        self.track.seconds = self.seconds_before + time.perf_counter() - self._started
        self.track.curve = [entry for entry in self.state.log_history if "loss" in entry]
        track = self.track.state()  # Every process adds its part.
        if not self.is_world_process_zero():
            return
        self._checkpoints.save(
            self.state.global_step,
            self.trained(),
            *self._inner(),
            {
                "track": track,
                "seconds": self.track.seconds,
                "micro_batch_size": self.args.per_device_train_batch_size,
            },
        )
