"""How a function that launches Triton kernels becomes an operator of torch.

`torch.compile` then keeps the kernels, and sees through the operator to fuse what is around them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.library import triton_op

from mixlora_exp.kernels.triton.parts import INTERPRETED

__all__ = ["operator"]

# A process may hold the kernels twice, compiled and interpreted: a name has one implementation.
NAMESPACE = "mixlora_interpreted" if INTERPRETED else "mixlora"


def operator(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function, which changes none of its arguments, as `mixlora::name`."""
    return triton_op(f"{NAMESPACE}::{name}", mutates_args={})
