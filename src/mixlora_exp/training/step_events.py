"""The events of transformers' loop that the trainer acts on."""

from __future__ import annotations

from typing import Any, Protocol

from transformers.trainer_callback import TrainerCallback


class TrainerSteps(Protocol):
    """What a trainer does at the events; `first` and `steps` count from the beginning of the run,
    including those before a resume."""

    first: int
    steps: int

    def check_gradients(self) -> None:
        """Check and clip the gradients of the step."""

    def after_optimizer(self) -> None:
        """Run the methods' hooks."""

    def finish_step(self) -> None:
        """Count the step, and request logging and checkpoints."""


class StepEvents(TrainerCallback):
    """Forwards events of the loop to the trainer."""

    def __init__(self, trainer: TrainerSteps) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Set the Trainer's step counters."""
        # TrainerSteps count from the beginning of the run, including those before a resume.
        state.global_step, state.max_steps = self.trainer.first, self.trainer.steps

    def on_pre_optimizer_step(self, args, state, control, **kwargs: Any) -> None:
        """Check and clip the gradients."""
        self.trainer.check_gradients()

    def on_optimizer_step(self, args, state, control, **kwargs: Any) -> None:
        """Run the methods' hooks."""
        self.trainer.after_optimizer()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """Count the step, and request logging and checkpoints."""
        self.trainer.finish_step()
