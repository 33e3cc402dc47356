"""Whether a compiled or recorded step has the gradients of the eager one: a step that leaves some
out is fast, and its time means nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixlora_exp.bench.batch import StepBatch
from mixlora_exp.bench.measure import loss_of, name_rows
from mixlora_exp.bench.model import base_of
from mixlora_exp.bench.recorded import WARM_UP, RecordedStep
from mixlora_exp.bench.row_registry import BenchRow

STEP = 0
"""The optimizer step whose masks of dropout the compared passes have."""
EXACT, ROUNDED, ROUTED = 1e-3, 0.2, 0.45
"""Differences allowed in float32, in 16 bits, and there with a router, whose choices follow the
rounding. bf16 against float32 differs by up to 0.02 with LoRA and 0.26 in a router (6 layers of
SmolLM2's shape); a gradient of which half is missing, by 0.5."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The parameter whose gradients differ most, and by how much:
    ||found - expected|| / ||expected||, 1 for a gradient that is missing."""

    parameter: str
    relative: float


def gradients_of(
    step: nn.Module | RecordedStep, row: BenchRow, batch: StepBatch
) -> dict[str, Tensor]:
    """Return the gradients of a training step on the batch, by the parameters' names, and as
    `input` that of the embeddings, where these are what the model is given. None is left in the
    model.

    step: a model, whose layers run as they are set up, or its recorded step, which is replayed.
    """
    model = step.model if isinstance(step, RecordedStep) else step
    model.train()
    given: dict[str, Any] = {}
    hook = base_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    # Compiled, PEFT's own dropout draws other numbers than eager.
    with _no_dropout(model) if row.stock else nullcontext():
        for _ in range(WARM_UP if isinstance(step, RecordedStep) else 1):
            model.zero_grad(set_to_none=True)
            if isinstance(step, RecordedStep):
                step.backward(STEP)
            else:
                name_rows(model, batch, step=STEP)
                loss_of(model, row, batch).backward()
    hook.remove()
    owners = {**dict(model.named_parameters()), "input": given.get("inputs_embeds")}
    found = {n: p.grad.clone() for n, p in owners.items() if p is not None and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def allowed(row: BenchRow, dtype: torch.dtype) -> float:
    """Return the largest difference that rounding explains; dtype: of the frozen weights."""
    if dtype.itemsize > 2:
        return EXACT
    return ROUTED if row.mixture or row.linear_mixture else ROUNDED


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """Return the parameter that differs most. What only one of the two has is compared with zeros;
    a difference that is not finite, or from zeros, is infinite."""
    errors = {}
    for name, like in {**found, **expected}.items():
        nothing = torch.zeros_like(like)
        wanted = expected.get(name, nothing).float()
        off = (found.get(name, nothing).float() - wanted).norm()
        errors[name] = torch.where(off == 0, 0.0, off / wanted.norm())
    relative = torch.stack(list(errors.values())).nan_to_num(torch.inf, posinf=torch.inf)
    largest = int(relative.argmax())
    return Difference(list(errors)[largest], float(relative[largest]))


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """Within this context no module of PEFT's or torch's drops anything."""
    held = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    for module in held:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in held.items():
            module.p = p
