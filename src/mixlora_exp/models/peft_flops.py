"""Floating-point operations of PEFT's own adapters, as torch counts them."""

from __future__ import annotations

from math import isnan, nan
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixlora_exp.config.schema import PeftMethodConfig
from mixlora_exp.models.peft_types import build_on_meta

ROWS = 8
"""Rows of the shorter of two passes."""


def _unknown(*_: Any, **__: Any) -> float:
    return nan


UNKNOWN = {getattr(torch.ops.aten, name): _unknown for name in ("_fft_r2c", "_fft_c2r", "_fft_c2c")}
"""What torch does not count, and does not tell: a Fourier transform is no matrix product."""


def peft_flops(model: nn.Module, method: PeftMethodConfig) -> int | None:
    """Return the FLOPs of the matrix products of one token's forward pass that a method adds to the
    projections of a model on the meta device; None where there are Fourier transforms, or where a
    pass needs the values of weights (WaveFT).

    By what passes over n and 2n rows differ: what is computed once in a pass whatever the number of
    rows, such as the product that makes LoHa's matrix, is not in it.

    Raises:
        UserError: `build_on_meta` does.
    """
    built = build_on_meta(model, method).eval()
    try:
        less, more = (_of_pass(built, rows) for rows in (ROWS, 2 * ROWS))
    except RuntimeError:  # On the meta device there are none.
        return None
    return None if isnan(less + more) else round((more - less) / ROWS)


@torch.no_grad()
def _of_pass(built: PeftModel, rows: int) -> float:
    """Return the FLOPs of all projections with an adapter, without those of the frozen weights."""
    frozen = 0
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        for module in built.modules():
            if isinstance(module, BaseTunerLayer):
                linear = module.get_base_layer()
                module(linear.weight.new_empty(1, rows, linear.in_features))
                frozen += 2 * rows * linear.in_features * linear.out_features
    return counter.get_total_flops() - frozen
