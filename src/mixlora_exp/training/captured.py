"""Gradients that do not move, for layers recorded in CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StaticGradients:
    """A forward pre-hook of the base model that gives each trained parameter one buffer for its
    gradient, the same in all steps.

    A replayed graph writes to the memory of its recording. Without a buffer autograd would keep a
    graph's output as the gradient itself, and the next micro-batch's replay would overwrite it
    before it was added. Each pass is announced to torch, which may then reuse the memory of the
    pass before: nothing that a compiled layer returned is read after its own pass.
    """

    def __init__(self) -> None:
        self._buffers: dict[nn.Parameter, Tensor] = {}

    def __call__(self, base: nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        torch.compiler.cudagraph_mark_step_begin()
        cleared = [p for p in base.parameters() if p.requires_grad and p.grad is None]
        kept = [self._buffers[p] for p in cleared if p in self._buffers]
        if kept:
            torch._foreach_zero_(kept)
        for parameter in cleared:
            if parameter not in self._buffers:
                self._buffers[parameter] = torch.zeros_like(parameter)
            parameter.grad = self._buffers[parameter]
