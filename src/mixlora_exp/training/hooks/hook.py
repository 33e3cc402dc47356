"""The points of the training loop at which a method can act; by default nothing happens there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.optim import Optimizer


class Hook:
    """A method's part in the training of one adapter. What it stores in
    `optimizer.state[parameter]` is part of checkpoints."""

    def resume(self, parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint. parameters: the trained ones by name; stored: the optimizer's
        state by `NAME/KEY`."""

    def begin(self, losses: Callable[[], Iterator[Tensor]]) -> None:
        """Run before the first step. losses: computes the losses of its micro-batches, which sum up
        to the step's."""

    def passing(self, share: float) -> AbstractContextManager[None]:
        """Return a context for a forward pass. share: its fraction of the optimizer step, over
        which a loss of the method's own is spread; 0: without that loss."""
        return nullcontext()

    def before_step(self) -> None:
        """Run between the clipping of the gradients and the optimizer's step."""

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Run after the optimizer's step number `step`, from 1, while there are gradients."""
