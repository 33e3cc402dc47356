"""A training step as `trainer.compile=graph` has it: the replay of a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from mixlora_exp.adapters.cache_source import adapters_changed
from mixlora_exp.bench.batch import StepBatch
from mixlora_exp.bench.measure import Clock, loss_of, name_rows
from mixlora_exp.bench.model import base_of
from mixlora_exp.bench.row_registry import BenchRow, NotHere
from mixlora_exp.kernels import RowIds
from mixlora_exp.models.precision import autocast
from mixlora_exp.training.compiled import bring_up_to_date
from mixlora_exp.training.cuda_graphs import CapturedPass, Recorder, StaticGradients

WARM_UP = 3
"""Steps until replays are as fast as they get: one compiles, one records, one replays."""


class RecordedStep:
    """The step of one model on one batch, to be called within `compiled_layers`."""

    def __init__(
        self, model: nn.Module, row: BenchRow, batch: StepBatch, recorder: Recorder
    ) -> None:
        self.model, self.row, self.batch = model, row, batch
        self._gradients = StaticGradients(list(model.parameters()))
        self._pass = CapturedPass(self._run, self._prepare, recorder)

    def __call__(self) -> float:
        """Return seconds of a step, which counts as an optimizer step.

        Raises:
            NotHere: the step cannot be recorded.
        """
        self.model.train()
        clock = Clock(self.batch.ids.device)
        clock.mark()
        self.backward()
        clock.mark()
        self.model.zero_grad(set_to_none=True)
        return clock.spans()[0]

    def backward(self, step: int | None = None) -> None:
        """Add to the gradients. step: the number of the optimizer step, by which masks of dropout
        differ, None for the next one.

        Raises:
            NotHere: the step cannot be recorded.
        """
        adapters_changed()
        rows = name_rows(self.model, self.batch, step=step)
        keys = {} if rows is None else {"keys": rows.keys}
        self._pass({**self.batch.inputs, "items": self.batch.items, **keys})
        if self._pass.failed is not None:
            raise NotHere(f"not measured: the step cannot be recorded: {self._pass.failed}")

    def _prepare(self) -> list[int]:
        self._gradients.restore()
        with autocast(self.batch.ids.device, self.batch.dtype):
            return bring_up_to_date(base_of(self.model))

    def _run(self, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        inputs = dict(given)
        if "keys" in inputs:
            self.model.dropout_stream.rows = RowIds(inputs.pop("keys"), None)
        batch = replace(self.batch, items=inputs.pop("items"), inputs=inputs)
        loss = loss_of(self.model, self.row, batch)
        loss.backward()
        return [loss.detach()]
