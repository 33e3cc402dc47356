"""What a training run did so far: losses, gradient norms, experts. It can be stored and continued,
so that an interrupted run tells the same as one that was not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.adapters.model import RouterReport
from mixlora_exp.training.stability import StepWatch

__all__ = ["Track"]


@dataclass
class Track:
    """Figures of one adapter's training.

    `counts`: tokens sent to each expert up to the last log entry, (layers, E); None without
    experts. `tokens`: real ones, without padding. `seconds`: of earlier starts of the same run.
    """

    every: int
    """Optimizer steps between two log entries."""
    watch: StepWatch = field(default_factory=StepWatch)
    curve: list[dict[str, Any]] = field(default_factory=list)
    counts: Tensor | None = None
    tokens: int | Tensor = 0
    seconds: float = 0.0
    _router_loss: Tensor | float = 0.0
    _router_passes: int = 0
    _window: Tensor | None = None

    def note_pass(self, report: RouterReport | None, tokens: int | Tensor) -> None:
        """Note one micro-batch; a tensor of a GPU is not waited for."""
        self.tokens += tokens
        if report is None:
            return
        self._router_loss = self._router_loss + report.loss.detach()
        self._router_passes += 1
        counts = report.counts.double()
        # After a restart the figures of before lie on the CPU.
        before = None if self._window is None else self._window.to(counts.device)
        self._window = counts if before is None else before + counts

    def entry(self, step: int) -> tuple[dict[str, float], list[list[float]] | None]:
        """What to log after optimizer step `step`, a multiple of `every`: figures since the last
        entry, and the share of each expert per layer. Starts a new window."""
        losses = self.watch.losses[-self.every :]
        figures = {"loss": sum(losses) / len(losses)}
        load = None
        if self._router_passes and self._window is not None:
            shares = self._window / self._window.sum(dim=-1, keepdim=True)
            figures["router_loss"] = float(self._router_loss) / self._router_passes
            figures["expert_load_std"] = float(shares.std(dim=-1, correction=0).mean())
            load = [[round(share, 4) for share in layer] for layer in shares.tolist()]
            self.fold()
        return figures, load

    def fold(self) -> None:
        """Add the counts since the last entry to `counts` and start a new window."""
        if self._window is not None:
            before = 0 if self.counts is None else self.counts.to(self._window.device)
            self.counts = self._window + before
        self._router_loss, self._router_passes, self._window = 0.0, 0, None

    def state(self) -> dict[str, Any]:
        """Everything, as JSON can hold it to the bit."""
        lists = {
            name: None if value is None else value.tolist()
            for name, value in (("counts", self.counts), ("window", self._window))
        }
        return {
            "losses": self.watch.losses,
            "norms": self.watch.norms,
            "curve": self.curve,
            "tokens": int(self.tokens),
            "router_loss": float(self._router_loss),
            "router_passes": self._router_passes,
            **lists,
        }

    def load(self, state: dict[str, Any], seconds: float) -> None:
        """Continue from what `state` returned; `seconds` is the time it took."""
        self.watch = StepWatch(list(state["losses"]), list(state["norms"]))
        self.curve, self.tokens = list(state["curve"]), state["tokens"]
        # In float32 as it was summed: a sum continued in another precision would end elsewhere.
        self._router_loss = torch.tensor(state["router_loss"]) if state["router_passes"] else 0.0
        self._router_passes = state["router_passes"]
        self.counts, self._window = (
            None if state[name] is None else torch.tensor(state[name], dtype=torch.float64)
            for name in ("counts", "window")
        )
        self.seconds = seconds
