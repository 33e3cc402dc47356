"""Row norms of DoRA for many projections together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixlora_exp.adapters.cache_source import Source
from mixlora_exp.kernels import dora_norms
from mixlora_exp.kernels.shapes import stacked

__all__ = ["norms_of", "norms_of_one_shape"]

TOGETHER = 2**26
"""Elements of the products `W A^T` that exist at a time: 256 MB, before a pass keeps anything."""


def norms_of(sources: Sequence[Source], squares: Sequence[Tensor]) -> list[Tensor]:
    """Compute ||W + s B A|| by rows of each source, (out,) or, of experts, (E, out).

    squares: ||W||^2 by rows, as of `kernels.squared_row_norms`. On a GPU, where a step waits for
    launches, projections of one shape go through together, with one product each; on a CPU one by
    one, and quantised ones too, whose matrices would otherwise exist together.
    """
    groups: dict[tuple, list[int]] = {}
    for i, one in enumerate(sources):
        shapes = one.weight.shape, one.a.shape, one.weight.dtype, one.a.dtype, one.weight.device
        groups.setdefault((*shapes, one.scaling), []).append(i)
    found: list[Tensor | None] = [None] * len(sources)
    for numbers in groups.values():
        first = sources[numbers[0]]
        size = 3 * len(first.weight) * first.a.shape[:-1].numel()
        alone = first.weight.device.type == "cpu" or first.dequantized is not None
        count = 1 if alone else max(1, TOGETHER // size)
        for start in range(0, len(numbers), count):
            some = numbers[start : start + count]
            made = norms_of_one_shape([sources[i] for i in some], [squares[i] for i in some])
            for i, norm in zip(some, made, strict=True):
                found[i] = norm
    return found


def norms_of_one_shape(sources: Sequence[Source], squares: Sequence[Tensor]) -> Sequence[Tensor]:
    """Row norms ||W + s B A|| of sources of one shape, each (out,) or, of experts, (E, out).

    squares: ||W||^2 by rows of each, (out,).
    """
    first = sources[0]
    a, b = stacked([one.a for one in sources]), stacked([one.b for one in sources])
    experts = a.dim() == 4
    if not experts:
        a, b = a.unsqueeze(1), b.unsqueeze(1)
    weights = [one.matrix() for one in sources]
    norms = dora_norms(weights, stacked(squares), a, b, first.scaling)
    return norms if experts else norms.squeeze(1)
