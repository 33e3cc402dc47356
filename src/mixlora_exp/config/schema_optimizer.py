"""Fields of the group `trainer` for the optimizer and the schedule of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from mixlora_exp.config.checks import require, require_positive
from mixlora_exp.config.optimizers import (
    FLOORED,
    FUSED_ADAMW,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerFacts,
)

BETAS = (0.9, 0.999)


@dataclass(slots=True, kw_only=True)
class OptimizerSettings:
    """Part of the group `trainer` (Table 3: AdamW, constant learning rate)."""

    learning_rate: float = 2e-4
    optim: str = FUSED_ADAMW
    """The optimizer by transformers' name, or muon; see `config/optimizers.py`."""
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [*BETAS])
    """AdamW's decay rates of the two moments."""
    schedule: str = "constant"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """What this schedule alone has, by name, as {num_cycles:3}: transformers'
    `lr_scheduler_kwargs`."""
    warmup_steps: int = 0
    final_rate: float = 0.0
    """schedule=linear or cosine: the share of the learning rate at which it ends."""
    max_grad_norm: float | None = None
    """Clip the gradient norm; null: no clipping."""

    @property
    def optimizer(self) -> OptimizerFacts:
        """Facts about the optimizer `optim`."""
        return OPTIMIZERS[self.optim]

    def check_optimizer(self) -> None:
        """Raise a `UserError` that names the field unless all values are valid."""
        require_positive("trainer.learning_rate", self.learning_rate)
        known = ", ".join(OPTIMIZERS)
        require(self.optim in OPTIMIZERS, "trainer.optim", self.optim, f"choose from {known}")
        require_positive("trainer.weight_decay", self.weight_decay, zero=True)
        require(
            len(self.betas) == 2
            and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in self.betas),
            "trainer.betas", self.betas, "must be two numbers in [0, 1)",
        )  # fmt: skip
        require(
            self.optimizer.betas or self.betas == [*BETAS],
            "trainer.betas", self.betas, f"trainer.optim={self.optim} has none: leave it out",
        )  # fmt: skip
        self._check_schedule()
        if self.max_grad_norm is not None:
            require_positive("trainer.max_grad_norm", self.max_grad_norm)

    def _check_schedule(self) -> None:
        require(self.warmup_steps >= 0, "trainer.warmup_steps", self.warmup_steps, "must be >= 0")
        require(
            self.schedule in SCHEDULES,
            "trainer.schedule", self.schedule, f"choose from {', '.join(SCHEDULES)}",
        )  # fmt: skip
        require(
            0 <= self.final_rate < 1, "trainer.final_rate", self.final_rate, "must be in [0, 1)"
        )
        why = "does not fall" if self.schedule == "constant" else "has options of its own"
        require(
            not self.final_rate or self.schedule in FLOORED,
            "trainer.final_rate", self.final_rate,
            f"trainer.schedule={self.schedule} {why}: add trainer.schedule=cosine, or linear",
        )  # fmt: skip
        options = SCHEDULES[self.schedule]
        for name, value in self.schedule_options.items():
            known = f"it has {', '.join(options)}" if options else "it has none"
            require(
                name in options,
                f"trainer.schedule_options.{name}", value,
                f"not an option of trainer.schedule={self.schedule}: {known}",
            )  # fmt: skip
            number = type(value) in (int, float) and isfinite(value) and value >= 0
            kind = name.endswith("_type")
            require(
                isinstance(value, str) if kind else number,
                f"trainer.schedule_options.{name}", value,
                "must be text" if kind else "must be a number >= 0",
            )  # fmt: skip
        missing = self.schedule == "warmup_stable_decay" and "num_decay_steps" not in (
            self.schedule_options
        )
        require(
            not missing,
            "trainer.schedule", self.schedule,
            "say over how many steps it falls: 'trainer.schedule_options={num_decay_steps:100}'",
        )  # fmt: skip
        least = {"min_lr", "min_lr_rate"}
        require(
            self.schedule != "cosine_with_min_lr" or len(least & set(self.schedule_options)) == 1,
            "trainer.schedule", self.schedule,
            "say where it ends by one of min_lr and min_lr_rate: "
            "'trainer.schedule_options={min_lr_rate:0.1}'",
        )  # fmt: skip
