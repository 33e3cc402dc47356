"""LoRA-FA (Zhang et al. 2023): A stays as it was drawn, and B's gradient is corrected for it."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from mixlora_exp.training.hooks.hook import Hook

RIDGE = 1e-8
"""Added to the diagonal of A A^T before it is inverted, as PEFT does."""


class LoraFa(Hook):
    """LoRA-FA: before each step B's gradient G becomes `G (A A^T)^-1 / s^2`, with which a step of B
    changes W + s B A most like a step of full fine-tuning would.

    AdamW then runs as ever. PEFT's `create_lorafa_optimizer` computes the same, but rounds the new
    gradient to bfloat16 and keeps its moments where checkpoints do not find them.
    """

    def __init__(self, model: PeftModel, adapter: str) -> None:
        self.corrections: list[torch.Tensor] = []
        self.layers = [
            (m.lora_A[adapter].weight, m.lora_B[adapter].weight, m.scaling[adapter])
            for m in model.modules()
            if isinstance(m, LoraLayer) and adapter in m.lora_A
        ]

    @torch.no_grad()
    def before_step(self) -> None:
        """Replace each gradient G of B by `G (A A^T)^-1 / s^2`."""
        if not self.corrections:
            # Not before: a checkpoint's A is read after the hook is made.
            self.corrections = [_inverse(a) / scaling**2 for a, _, scaling in self.layers]
        for (_, b, _), correction in zip(self.layers, self.corrections, strict=True):
            if b.grad is not None:
                b.grad = b.grad @ correction


def _inverse(a: torch.Tensor) -> torch.Tensor:
    """Return `(A A^T)^-1` (r, r) of A (r, in), with a ridge."""
    ridge = RIDGE * torch.eye(len(a), dtype=a.dtype, device=a.device)
    return torch.linalg.pinv(a @ a.T + ridge)
