"""The transformers Trainer with length buckets and the router's figures in its log."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from accelerate import DistributedType
from transformers import Trainer

from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.config.choices import Head, Order
from mixlora_exp.data.sampler import BucketSampler, FixedSampler, sampler_of
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.training.head import loss_from_hidden
from mixlora_exp.training.stability import Diverged, StepWatch, find_layer

__all__ = ["MixLoraTrainer"]

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Each process holds every gradient whole."""


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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._head = head
        self._order = order
        self._sampler_seed = sampler_seed
        self._router_loss, self._router_passes = 0.0, 0
        self._window_counts: torch.Tensor | None = None
        self.watch = StepWatch()
        self._stream = DropoutStream(sampler_seed, process=self.args.process_index)
        for adapter in self.model.active_adapters:
            use_dropout_stream(self.model, adapter, self._stream)
        self._step_loss: float | torch.Tensor = 0.0
        self._step_batches: list[Any] = []
        self.expert_load: list[list[float]] | None = None
        """Share of each expert, per layer, between the last two log entries."""
        self.expert_counts: torch.Tensor | None = None
        """Tokens sent to each expert in training so far, (layers, E); None without experts."""

    def _get_train_sampler(self, train_dataset=None) -> BucketSampler | FixedSampler:
        examples = train_dataset if train_dataset is not None else self.train_dataset
        # accelerate deals micro-batches out to the processes in turn.
        micro_batches = self.args.gradient_accumulation_steps * self.args.world_size
        batch = self.args.train_batch_size * micro_batches
        lengths = [len(example.input_ids) for example in examples]
        return sampler_of(lengths, batch, self._sampler_seed, self._order)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tuner = self.accelerator.unwrap_model(model).base_model
        # Outputs that somebody asks for must be whole.
        head = Head.full if return_outputs else self._head
        with loss_from_hidden(tuner.model, head):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        report = getattr(tuner, "router_report", None)
        if report is not None:
            self._router_loss += report.loss.detach()
            self._router_passes += 1
            counts = report.counts.double()
            empty = torch.zeros_like(counts)
            self._window_counts = counts + (
                empty if self._window_counts is None else self._window_counts
            )
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
        sound = self.watch.add(loss, norm)
        # Of several processes all see the same norm, and each a loss of its own.
        if not sound and (self.args.world_size == 1 or not isfinite(norm)):
            prepared = [self._prepare_inputs(batch) for batch in batches]
            try:
                where = find_layer(self.accelerator.unwrap_model(model), prepared)
            except RuntimeError as error:
                # It computes all logits, for which memory may not suffice.
                where = f"the layer was not found: {str(error).splitlines()[0][:80]}"
            raise Diverged(self.state.global_step + 1, loss, norm, where)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._router_passes and "loss" in logs:
            counts = self._window_counts
            load = counts / counts.sum(dim=-1, keepdim=True)
            logs["router_loss"] = float(self._router_loss) / self._router_passes
            logs["expert_load_std"] = float(load.std(dim=-1, correction=0).mean())
            self.expert_load = [[round(share, 4) for share in layer] for layer in load.tolist()]
            self.fold_counts()
        super().log(logs, start_time)

    def fold_counts(self) -> None:
        """Add the counts since the last log to `expert_counts` and start a new window."""
        if self._window_counts is not None:
            total = self.expert_counts
            self.expert_counts = self._window_counts + (0 if total is None else total)
        self._router_loss, self._router_passes, self._window_counts = 0.0, 0, None
