"""The block by algebra: MixLoRA applies each frozen weight once per token, and is exact.

The down projection is linear and shared by all experts, so

    sum_k w_k (W2 h_k + s B2_k A2_k h_k)  =  W2 (sum_k w_k h_k)  +  s sum_k w_k B2_k A2_k h_k

and W1, W3 and W2 run once per token whatever K is. With DoRA the row scale of an expert stands
before the sum, so W2 runs on K hidden states; gate and up still run once. For the backward pass
only x, W1 x, W3 x and the routing are kept; the experts' part is computed again from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixlora_exp.kernels.dropout import INDEX_BYTES
from mixlora_exp.kernels.mixlora.dense import dense_stage
from mixlora_exp.kernels.mixlora.grouped import grouped_stage
from mixlora_exp.kernels.mixlora.stage import Finish, run_stage
from mixlora_exp.kernels.registry import BlockSizes, kernel
from mixlora_exp.kernels.shapes import FeedForward, Routing

__all__ = ["exact_stage", "mixlora_exact", "saved_by_exact"]


def _grouped_fits(x: Tensor, block: FeedForward) -> bool:
    """Return whether to use the grouped form: on a CPU it is faster
    (`results/bench/forms-cpu.json`) but for MixDoRA's K hidden states per token in bf16 at large
    widths. Compiled or on a GPU nothing may depend on the data; and it has no gradient for biases
    of gate and up."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or len(x) == 0:
        return False
    if any(p.bias is not None and p.bias.requires_grad for p in (block.gate, block.up)):
        return False
    wide = x.dtype is torch.bfloat16 and x.shape[1] >= 2048 and x.shape[0] >= 64
    return torch.is_grad_enabled() or not (block.down.has_scale and wide)


def exact_stage(
    x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
) -> tuple[Tensor, Finish]:
    """Return the block's hidden state and how to finish it, in the form that is faster for this
    device and shape; see `kernels.mixlora.stage`."""
    stage = grouped_stage if _grouped_fits(x, block) else dense_stage
    return stage(x, gate, up, routing, block)


def saved_by_exact(sizes: BlockSizes) -> float:
    """x, which in float32 the router has already, W1 x and W3 x, with DoRA K outputs, and the
    masks' indices of dropped elements; see `registry.Kernel`."""
    numbers = 2 * sizes.f + (sizes.slots * sizes.d if sizes.dora else 0)
    numbers += 0 if sizes.width == 4 else sizes.d
    return sizes.width * numbers + sizes.dropout * INDEX_BYTES * (sizes.d + sizes.f)


@kernel("exact", stage=exact_stage, saved=saved_by_exact)
def mixlora_exact(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """Each frozen weight once per token (DoRA's down K times), little kept for the backward.

    `y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D).
    """
    return run_stage(exact_stage, x, routing, block)
