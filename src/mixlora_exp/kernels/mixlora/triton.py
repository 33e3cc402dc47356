"""The exact kernel with the experts' part fused by Triton, for a GPU (see `kernels.triton`)."""

from __future__ import annotations

from torch import Tensor

from mixlora_exp.kernels.mixlora.exact import exact_stage, saved_by_exact
from mixlora_exp.kernels.registry import BlockSizes, kernel
from mixlora_exp.kernels.shapes import FeedForward, Routing

__all__ = ["mixlora_triton"]


def _saved(sizes: BlockSizes) -> float:
    """As `exact`, and of each slot the columns of the three low-rank products."""
    return saved_by_exact(sizes) + 3 * sizes.width * sizes.rank * sizes.slots


# Several adapters share the frozen products, which the fused kernels hold inside.
@kernel("triton", device="cuda", needs="triton", stage=exact_stage, saved=_saved)
def mixlora_triton(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """The exact kernel with fused GPU kernels.

    `y_t = sum_k w_k(t) FFN_{e_k(t)}(x_t)`. x: (T, D); returns (T, D).
    """
    # Not before it is used: Triton is missing on many machines.
    from mixlora_exp.kernels.triton.block import fused_block as run

    return run(x, routing, block)
