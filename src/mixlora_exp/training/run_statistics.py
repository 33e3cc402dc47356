"""Statistics of a training run: losses, gradient norms, expert counts. They are stored in
checkpoints, so that a resumed run reports the same as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.adapters.router_report import RouterReport
from mixlora_exp.training.stability import StepWatch


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass
class Track:
    """Statistics of one adapter's training in this process.

    `counts`: (layers, E), tokens routed to each expert up to the last log entry; None without
    experts. `tokens`: without padding. `seconds`: training time, including earlier starts.
    """

    every: int
    """Optimizer steps between two log entries."""
    summed: Callable[[Tensor], Tensor] = _alone
    """Sums over the processes that train the adapter. `entry`, `state`, `total_tokens` and
    `expert_load` cover all processes, which must call them at the same time."""
    watch: StepWatch = field(default_factory=StepWatch)
    curve: list[dict[str, Any]] = field(default_factory=list)
    counts: Tensor | None = None
    tokens: int | Tensor = 0
    seconds: float = 0.0
    _router_loss: Tensor | float = 0.0
    """Sum over the optimizer steps since the last log entry."""
    _window: Tensor | None = None
    _after_first: tuple[int, float] = (0, 0.0)
    """Tokens and seconds at the end of this start's first step."""

    def note_pass(
        self, report: RouterReport | None, tokens: int | Tensor, share: float | Tensor
    ) -> None:
        """Add one micro-batch, without synchronising with the GPU. share: its fraction of the
        optimizer step's label tokens, the weight of its router loss in the objective."""
        self.tokens += tokens
        if report is None:
            return
        self._router_loss = self._router_loss + report.loss.detach() * share
        counts = report.counts.double()
        # After a resume the earlier counts are on the CPU.
        before = None if self._window is None else self._window.to(counts.device)
        self._window = counts if before is None else before + counts

    def entry(self, step: int) -> tuple[dict[str, float], list[list[float]] | None]:
        """Return the log entry after optimizer step `step`, a multiple of `every`: figures since
        the last entry, and each expert's share (layers, E). Starts a new window.

        `loss` and `router_loss` are means over the optimizer steps: `loss` minus `router_loss`
        times its coefficient is the cross-entropy."""
        losses = self.watch.losses[-self.every :]
        figures = {"loss": sum(losses) / len(losses)}
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
        """Return (layers, E): share of each expert in all (token, slot) pairs so far; None without
        experts."""
        self.fold()
        return None if self.counts is None else _shares(self.summed(self.counts)).tolist()

    def total_tokens(self) -> int:
        """Return tokens so far without padding, of all processes."""
        return int(self.summed(torch.as_tensor(self.tokens)))

    def note_first_step(self) -> None:
        """The step that ended is this start's first, in which kernels are compiled and memory is
        taken: `tokens_per_second` leaves it out. All processes call this at the same time."""
        self._after_first = self.total_tokens(), self.seconds

    def tokens_per_second(self) -> float:
        """Return the speed of this start's steps after its first one; of all steps where it is the
        last."""
        tokens, seconds = self._after_first
        if self.seconds <= seconds:
            tokens, seconds = 0, 0.0
        return (self.total_tokens() - tokens) / (self.seconds - seconds)

    def _sum_of_losses(self) -> Tensor:
        # In float32 as before: continuing the sum in another precision would change the result.
        return torch.as_tensor(self._router_loss, dtype=torch.float32)

    def state(self) -> dict[str, Any]:
        """Return all statistics in a form that JSON stores exactly."""
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
        """Restore the result of `state`; `seconds`: training time so far. Only the `first` process
        takes the sums over all processes, which would otherwise be counted several times."""
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
    """Return each expert's share of its layer's counts (layers, E); 0 for a layer without
    tokens."""
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
