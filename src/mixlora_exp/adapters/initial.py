"""Initial weights of a MixLoRA adapter, and of LoRA where PEFT's are rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mixlora_exp.adapters.config import MixLoraConfig
from mixlora_exp.kernels import Router, matrix_of, squared_row_norms

__all__ = ["initial_weights", "start_orthogonally"]


def initial_weights(
    config: MixLoraConfig, router: Router, projections: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """Return initial weights by parameter name: the router's own initialisation; A drawn as in
    PEFT's LoRA (uniform, or gaussian), B zero, and with DoRA the magnitude equal to the row norms
    of W.

    projections: by role, gate first, including those without experts. Shapes: A (E, R, in),
    B (E, out, R), magnitude (E, out).
    """
    lora, experts, made = config.experts, router.num_experts, {}
    for part, weight in router.initial(projections["gate"].in_features).items():
        made[f"lora_router_{part}" if part else "lora_router"] = weight
    adapted = dict(zip(projections, config.feed_forward_targets, strict=True))
    for role, frozen in projections.items():
        if adapted[role] not in config.expert_targets:
            continue
        a = torch.empty(experts, lora.r, frozen.in_features)
        # PEFT's kaiming_uniform(a=sqrt(5)) is uniform in +-1/sqrt(fan_in) of each expert.
        bound = 1 / math.sqrt(frozen.in_features)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / lora.r)
        else:
            nn.init.uniform_(a, -bound, bound)
        b = torch.zeros(experts, frozen.out_features, lora.r)
        if not config.init_lora_weights:
            nn.init.uniform_(b, -1 / math.sqrt(lora.r), 1 / math.sqrt(lora.r))
        made |= {f"lora_A_{role}": a, f"lora_B_{role}": b}
        if lora.use_dora:
            # With B = 0 the magnitude is the row norm of W; also used for random B (tests).
            norms = squared_row_norms(matrix_of(frozen).detach()).sqrt().to(a.device)
            made[f"lora_magnitude_{role}"] = norms.expand(experts, -1).clone()
    return made


@torch.no_grad()
def start_orthogonally(model: nn.Module, adapter: str) -> None:
    """Draw A (R, in) and B (out, R) of a LoRA as PEFT's `init_lora_weights="orthogonal"` does, but
    in float32: A is made of the odd and B of the even rows of an orthogonal matrix (R, R), so that
    B A = 0. PEFT rounds them to the base's type, in bf16 so much that outputs change."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        rank = module.r[adapter]
        rows, _ = torch.linalg.qr(torch.randn(rank, rank))
        inner = torch.randn(module.in_features, rank // 2) @ rows[0::2]
        outer = torch.randn(module.out_features, rank // 2) @ rows[1::2]
        a.copy_(inner.T / 10)
        b.copy_(outer / 10)
