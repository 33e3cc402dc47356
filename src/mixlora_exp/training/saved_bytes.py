"""Counts the bytes that autograd keeps for a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixlora_exp.kernels import stored


def storages_of(model: nn.Module) -> set[int]:
    """Return the data pointers of all parameters and buffers, which exist anyway."""
    held = map(stored, [*model.parameters(), *model.buffers()])
    return {tensor.untyped_storage().data_ptr() for tensor in held}


@contextmanager
def counting_saved(owned: set[int]) -> Iterator[Callable[[], int]]:
    """Within this context the yielded function tells how many bytes autograd keeps at that moment
    of what was computed in it, each storage once and without `owned`, data pointers of storages."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        found = _Kept(tensor)
        kept.add(found)
        return found

    def total() -> int:
        # Not in `pack`: what a part of the graph kept that is gone again does not count, and its
        # memory may have been given to others.
        storages = [found.tensor.untyped_storage() for found in kept]
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in owned}
        return sum(sizes.values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        yield total


def saved_bytes(run: Callable[[], Tensor], owned: set[int]) -> int:
    """Return bytes that autograd keeps for the backward pass of `run()`; see `counting_saved`."""
    with counting_saved(owned) as total:
        result = run()
        found = total()
    del result
    return found


class _Kept:
    """A tensor that autograd keeps, for as long as it does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
