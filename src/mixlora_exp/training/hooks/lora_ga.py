"""LoRA-GA: before training, the gradient of the loss by the frozen weights decides where A and B
start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from mixlora_exp.adapters.mixtures.layer import MixtureLinear
from mixlora_exp.system.device import processes, summed
from mixlora_exp.training.hooks.hook import Hook

START = "lora_ga_start"
"""Key of the optimizer's state: A0 or B0, which a resumed run cannot compute again."""


class GradientStart(Hook):
    """LoRA-GA: A and B start from the gradient of the target weights on the first optimizer step's
    batches.

    Takes one pass over them without the adapter, and as much memory as the target weights for their
    gradients.
    """

    def __init__(self, model: PeftModel, adapter: str) -> None:
        self.model, self.adapter = model, adapter
        layers = (m for m in model.modules() if isinstance(m, MixtureLinear))
        self.layers = [layer for layer in layers if adapter in layer.mixture]

    def _held(self, part: str) -> list[nn.Parameter]:
        return [getattr(layer, f"lora_{part}")[self.adapter] for layer in self.layers]

    def begin(self, losses: Callable[[], Iterator[Tensor]]) -> None:
        """Compute the target weights' gradients without the adapter, and set A, B, A0 and B0 from
        them."""
        weights = [layer.get_base_layer().weight for layer in self.layers]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with self.model.disable_adapter(), torch.enable_grad():
                for loss in losses():
                    loss.backward()
            for layer, weight in zip(self.layers, weights, strict=True):
                # Losses are those of all processes' items, times the number of processes.
                self._start(layer, summed(weight.grad) / processes().num_processes)
        finally:
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)

    @torch.no_grad()
    def _start(self, layer: MixtureLinear, gradient: Tensor) -> None:
        method, rank = layer.mixture[self.adapter], layer.r[self.adapter]
        for part, start in method.from_gradient(gradient, rank).items():
            getattr(layer, f"lora_{part}")[self.adapter].copy_(start)

    @torch.no_grad()
    def resume(self, parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]) -> None:
        """Restore A0 and B0, which are not in the adapter's trained weights."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        for part in ("A", "B"):
            for trained, fixed in zip(self._held(part), self._held(f"{part}0"), strict=True):
                fixed.copy_(stored[f"{names[id(trained)]}/{START}"])

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Store A0 and B0 with the optimizer's state."""
        for part in ("A", "B"):
            for trained, fixed in zip(self._held(part), self._held(f"{part}0"), strict=True):
                optimizer.state[trained][START] = fixed.detach()
