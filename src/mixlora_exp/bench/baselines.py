"""A training step in other libraries: liger-kernel's model patches, axolotl's fused functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_exp.bench.model import adapted
from mixlora_exp.bench.row_registry import BenchRow, NotHere, row
from mixlora_exp.config.schema import ATTENTION_TARGETS
from mixlora_exp.errors import UserError


def check_liger() -> None:
    """Check that liger-kernel can run here.

    Raises:
        UserError: there is no CUDA GPU, or the package is not installed.
    """
    if not torch.cuda.is_available():
        raise UserError("liger=true needs a CUDA GPU, for which liger-kernel's kernels are written")
    if find_spec("liger_kernel") is None:
        raise UserError("liger=true needs liger-kernel: pip install liger-kernel, or liger=false")


def patch_with_liger(base: PreTrainedModel) -> None:
    """Let RMSNorm, rotary embedding and SwiGLU or GeGLU of `base`, and of the rows on it, be
    liger-kernel's. The loss stays each row's own."""
    # The only entry for a model that exists; transformers' Trainer uses it as well.
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model=base, cross_entropy=False, fused_linear_cross_entropy=False
    )


@row("lora_axolotl", method="lora", head="full")
def lora_axolotl(base: PreTrainedModel, row: BenchRow, dropout: float, seed: int) -> nn.Module:
    """Return PEFT's LoRA with axolotl's `kernels.lora`, whose activation is a Triton kernel.

    Raises:
        NotHere: axolotl or a GPU is missing, or the model's family is not wired.
    """
    try:
        functions = import_module("axolotl.kernels.lora")
    except ImportError as error:
        # axolotl itself, or one of those that the module imports, such as bitsandbytes.
        raise NotHere(f"not installed: axolotl.kernels.lora ({error})") from error
    if base.device.type == "cpu":
        raise NotHere("not measured: needs a GPU")
    if base.config.model_type != "llama":
        raise NotHere(f"not measured: not wired for {base.config.model_type}")
    return use_axolotl(adapted(base, row, dropout, seed), functions)


def use_axolotl(model: nn.Module, functions: Any) -> nn.Module:
    """Let the layers of a Llama with PEFT's LoRA on all projections be computed by axolotl's
    functions: q, k and v by one, o, and the feed-forward block."""
    for layer in model.base_model.model.model.layers:
        layer.mlp.forward = partial(functions.apply_lora_mlp_swiglu, layer.mlp)
        attention = layer.self_attn
        siblings = _Siblings(partial(functions.apply_lora_qkv, attention))
        for number, name in enumerate(ATTENTION_TARGETS[:3]):
            getattr(attention, name).forward = partial(siblings, number)
        attention.o_proj.forward = partial(functions.apply_lora_o, attention)
    return model


class _Siblings:
    """Three projections of one input that one call computes, for a caller that asks one by one."""

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        self.compute = compute
        self.made: tuple[Tensor, ...] = ()

    def __call__(self, number: int, x: Tensor) -> Tensor:
        if number == 0:
            self.made = self.compute(x)
        found = self.made[number]
        if number == 2:
            self.made = ()
        return found
