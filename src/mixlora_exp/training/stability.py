"""Training stability: gradient norms, loss spikes, and the layer of the first non-finite value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mixlora_exp.records.spikes import spikes


@dataclass(frozen=True, slots=True)
class Stability:
    """Stability figures of a record. Norms are of the full gradient before clipping; spikes are
    optimizer steps, counted from 1 (see `records.spikes`)."""

    gradient_norm_median: float
    gradient_norm_max: float
    gradient_norm_max_step: int
    gradient_spikes: list[int]
    loss_spikes: list[int]
    step_losses: list[float]
    step_gradient_norms: list[float]


class Diverged(ArithmeticError):
    """The loss or its gradient at step `step` is not finite; raised before the optimizer steps.

    `usable`: the current weights still give a finite loss, so only step `step` is lost. Otherwise
    the previous update broke them, and only earlier weights can be good.
    """

    def __init__(
        self, step: int, loss: float, norm: float, where: str, *, usable: bool, last: bool = False
    ) -> None:
        what = f"loss became {loss}" if not isfinite(loss) else f"gradient norm became {norm}"
        when = f"after the last step, {step - 1}" if last else f"at step {step}"
        super().__init__(f"the {what} {when} ({where})")
        self.step, self.usable = step, usable

    @property
    def good(self) -> int:
        """Number of the last optimizer step after which the weights may have been good."""
        return self.step - (1 if self.usable else 2)


@dataclass
class StepWatch:
    """Loss and gradient norm of every optimizer step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def add(self, loss: float, norm: float) -> bool:
        """Add one step; returns whether both values are finite."""
        self.losses.append(loss)
        self.norms.append(norm)
        return isfinite(loss) and isfinite(norm)

    def summary(self) -> Stability | None:
        """Return the figures so far; None before the first step."""
        if not self.norms:
            return None
        largest = max(range(len(self.norms)), key=self.norms.__getitem__)
        return Stability(
            gradient_norm_median=round(median(self.norms), 6),
            gradient_norm_max=round(self.norms[largest], 6),
            gradient_norm_max_step=largest + 1,
            gradient_spikes=[i + 1 for i in spikes(self.norms)],
            loss_spikes=[i + 1 for i in spikes(self.losses)],
            step_losses=[round(value, 5) for value in self.losses],
            step_gradient_norms=[round(value, 5) for value in self.norms],
        )


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _broken(output: Any) -> bool:
    return any(t.is_floating_point() and not t.isfinite().all() for t in _tensors(output))


@torch.no_grad()
def find_layer(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Any] | None = None,
    trained: Mapping[str, nn.Parameter] | None = None,
) -> str:
    """Describe where the first non-finite value occurs.

    Checks, in order: the weights; the outputs of all modules in another forward pass over
    `batches`; the gradients, of which the one nearest to the output is named. `run` passes a batch
    through the model; `trained` are the weights to check (default: all).
    """
    weights = dict(model.named_parameters()) if trained is None else trained
    for name, weight in weights.items():
        if not weight.isfinite().all():
            return f"the weight {name} is not finite"
    found: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if not found and _broken(output):
                found.append(name)

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        for batch in batches:
            model(**batch) if run is None else run(batch)
            if found:
                return f"first in {found[0] or 'the loss'}"
    finally:
        for handle in handles:
            handle.remove()
    graded = [(n, p.grad) for n, p in weights.items() if p.grad is not None]
    broken = [name for name, gradient in graded if not gradient.isfinite().all()]
    return f"in the gradient of {broken[-1]}" if broken else "in no layer when it was run again"
