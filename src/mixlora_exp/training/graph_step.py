"""`trainer.compile=graph`: an adapter's micro-batches through recordings (`captured`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from mixlora_exp.adapters import RouterReport
from mixlora_exp.config.choices import Compile, Head
from mixlora_exp.config.schema import Config, LoraMethodConfig
from mixlora_exp.kernels import RowIds
from mixlora_exp.models.precision import autocast
from mixlora_exp.system.device import processes
from mixlora_exp.training.compiled import bring_up_to_date
from mixlora_exp.training.cuda_graphs import CapturedPass, CudaRecorder, Recorder, StaticGradients
from mixlora_exp.training.job import Batch, Job
from mixlora_exp.training.losses import label_count, single_loss


def recorder(config: Config, device: torch.device) -> Recorder | None:
    """Return what records the passes of a run with `trainer.compile=graph`; None, after a line with
    the reason, where they run as with `layer`."""
    if config.trainer.compile is not Compile.graph:
        return None
    reason = None
    if device.type != "cuda":
        reason = "a CPU has no graphs to record"
    elif processes().num_processes > 1:
        reason = "several processes sum their gradients outside of graphs"
    elif config.trainer.gradient_checkpointing:
        reason = "gradient checkpointing reads the random state, which no graph may"
    elif not isinstance(config.method, LoraMethodConfig):
        reason = f"method={config.method.name} is PEFT's, whose passes are not recorded"
    if reason is not None:
        sys.stderr.write(f"trainer.compile=graph: {reason}: it runs as layer\n")
        return None
    return CudaRecorder(device)


class GraphStep:
    """The forward and backward pass of the only adapter's micro-batches."""

    def __init__(
        self, model: PeftModel, job: Job, head: Head, dtype: torch.dtype, made: Recorder
    ) -> None:
        self.model, self.job = model, job
        self._head, self._dtype = head, dtype
        self._base = model.base_model.model
        self._parameters = list(job.parameters.values())
        self._gradients = StaticGradients(self._parameters)
        self._pass = CapturedPass(self._run, self._prepare, made)

    def __call__(
        self, step: int, batches: Mapping[str, Batch], counts: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss of a micro-batch, after its gradients were added; see
        `Trainer.training_step`. counts: label tokens of the optimizer step, by adapter as
        `batches`."""
        ((name, batch),) = batches.items()
        items = counts[name]
        if not self.model.training:
            self.model.train()
        inputs = self.job.begin_pass(step, batch)
        rows = self.job.stream.rows
        ids = {"keys": rows.keys} if rows.runs is None else {"keys": rows.keys, "runs": rows.runs}
        tensors = {name: value.contiguous() for name, value in inputs.items()}
        self._share = 1 / self.job.plan[self.job.step].parts
        loss, *report = self._pass({**tensors, **ids, "items": items}, self._share)
        made = RouterReport(*report) if report else None
        self.job.note_pass(loss, made, label_count(inputs) / items)
        return loss

    def _prepare(self) -> list[int]:
        self._gradients.restore()
        with autocast(self._base.device, self._dtype):
            places = bring_up_to_date(self._base)
        return places + [p.data_ptr() for p in self._parameters]

    def _run(self, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        batch = dict(given)
        self.job.stream.rows = RowIds(batch.pop("keys"), batch.pop("runs", None))
        items = batch.pop("items")
        with self.job.hook.passing(self._share), autocast(self._base.device, self._dtype):
            loss = single_loss(self.model, self._base, batch, items, self._head)
        loss.backward()
        report = getattr(self.model.base_model, "router_reports", {}).get(self.job.name)
        return [loss.detach(), *(() if report is None else (report.loss, report.counts))]


def graph_step(model: PeftModel, job: Job, dtype: torch.dtype) -> GraphStep | None:
    """Return what runs the micro-batches of a run with `trainer.compile=graph`; None, maybe after a
    line with the reason, for all that run as ever."""
    made = recorder(job.config, model.device)
    return None if made is None else GraphStep(model, job, job.config.trainer.head, dtype, made)
