"""LoRA and DoRA of one linear layer by each of the functions that compute them."""

from __future__ import annotations

from torch import Tensor

from mixlora_exp.kernels import FrozenLinear
from mixlora_exp.kernels.lora import lora_linears
from mixlora_exp.kernels.lora_many import lora_add
from mixlora_exp.kernels.low_rank import LowRankPart


def by_itself(x: Tensor, weight: Tensor, part: LowRankPart) -> Tensor:
    """`lora_linears` of one layer."""
    return lora_linears(x, [FrozenLinear(weight)], [part])[0]


def among_several(x: Tensor, weight: Tensor, part: LowRankPart) -> Tensor:
    """`lora_add` of one adapter."""
    return lora_add(x @ weight.T, x, part)
