"""What a training run did so far: losses, gradient norms, experts. It can be stored and continued,
so that an interrupted run tells the same as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.adapters.model import RouterReport
from mixlora_exp.training.stability import StepWatch

__all__ = ["Track"]


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass
class Track:
    """Figures of one adapter's training, as far as this process sees it.

    `counts`: tokens sent to each expert up to the last log entry, (layers, E); None without
    experts. `tokens`: real ones, without padding. `seconds`: of earlier starts of the same run.
    """

    every: int
    """Optimizer steps between two log entries."""
    summed: Callable[[Tensor], Tensor] = _alone
    """The sum over the processes that train the adapter together. All of them have to ask for
    `entry`, `state`, `total_tokens` and `expert_load` at the same time, which tell of all."""
    watch: StepWatch = field(default_factory=StepWatch)
    curve: list[dict[str, Any]] = field(default_factory=list)
    counts: Tensor | None = None
    tokens: int | Tensor = 0
    seconds: float = 0.0
    _router_loss: Tensor | float = 0.0
    """Sum over the optimizer steps of the window."""
    _window: Tensor | None = None

    def note_pass(
        self, report: RouterReport | None, tokens: int | Tensor, share: float | Tensor
    ) -> None:
        """Note one micro-batch; a tensor of a GPU is not waited for. share: its part of the label
        tokens of the optimizer step, by which the objective weighs its router loss."""
        self.tokens += tokens
        if report is None:
            return
        self._router_loss = self._router_loss + report.loss.detach() * share
        counts = report.counts.double()
        # After a restart the figures of before lie on the CPU.
        before = None if self._window is None else self._window.to(counts.device)
        self._window = counts if before is None else before + counts

    def entry(self, step: int) -> tuple[dict[str, float], list[list[float]] | None]:
        """What to log after optimizer step `step`, a multiple of `every`: figures since the last
        entry, and the share of each expert per layer. Starts a new window.

        `loss` and `router_loss` are means over the optimizer steps, so that `loss` less the router
        loss times its coefficient is the model's own loss."""
        losses = self.watch.losses[-self.every :]
        # A process's losses are of its own rows, in the scale of the whole.
        own = torch.tensor([sum(losses) / len(losses), 1.0], dtype=torch.float64)
        total, processes = self.summed(own).tolist()
        figures = {"loss": total / processes}
        load = None
        if self._window is not None:
            shares = _shares(self.summed(self._window))
            figures["router_loss"] = float(self.summed(self._sum_of_losses())) / len(losses)
            figures["expert_load_std"] = float(shares.std(dim=-1, correction=0).mean())
            load = [[round(share, 4) for share in layer] for layer in shares.tolist()]
            self.fold()
        return figures, load

    def fold(self) -> None:
        """Add the counts since the last entry to `counts` and start a new window."""
        if self._window is not None:
            before = 0 if self.counts is None else self.counts.to(self._window.device)
            self.counts = self._window + before
        self._router_loss, self._window = 0.0, None

    def expert_load(self) -> list[list[float]] | None:
        """Share of each expert in all (token, slot) pairs so far, (layers, E); None without."""
        self.fold()
        return None if self.counts is None else _shares(self.summed(self.counts)).tolist()

    def total_tokens(self) -> int:
        """Real tokens so far, of all processes."""
        return int(self.summed(torch.as_tensor(self.tokens)))

    def _sum_of_losses(self) -> Tensor:
        # In float32 as it was summed: a sum continued in another precision would end elsewhere.
        return torch.as_tensor(self._router_loss, dtype=torch.float32)

    def state(self) -> dict[str, Any]:
        """Everything, as JSON can hold it to the bit."""
        lists = {
            name: None if value is None else self.summed(value).tolist()
            for name, value in (("counts", self.counts), ("window", self._window))
        }
        return {
            "losses": self.watch.losses,
            "norms": self.watch.norms,
            "curve": self.curve,
            "tokens": self.total_tokens(),
            "router_loss": float(self.summed(self._sum_of_losses())),
            **lists,
        }

    def load(self, state: dict[str, Any], seconds: float, *, first: bool = True) -> None:
        """Continue from what `state` returned; `seconds` is the time it took. What it has of all
        processes goes to the `first` one: each would add it to the sum again."""
        self.watch = StepWatch(list(state["losses"]), list(state["norms"]))
        own = 1 if first else 0
        self.curve, self.tokens = list(state["curve"]), own * state["tokens"]
        self._router_loss = own * torch.tensor(state["router_loss"], dtype=torch.float32)
        self.counts, self._window = (
            None if state[name] is None else own * torch.tensor(state[name], dtype=torch.float64)
            for name in ("counts", "window")
        )
        self.seconds = seconds


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(dim=-1, keepdim=True)
