"""Stands in for CUDA graphs on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mixlora_exp.training.cuda_graphs import Recorder


class StandIn(Recorder):
    """Records nothing: a replay computes anew, from the same tensors."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, compute: Callable[[], Sequence[Tensor]]) -> tuple:
        self.recorded += 1
        results: list[Tensor] = []

        def replay() -> None:
            self.replayed += 1
            results[:] = compute()

        return replay, results
