"""The events of transformers' loop that the trainer acts on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

if TYPE_CHECKING:
    from mixlora_exp.training.trainer import MixLoraTrainer


class StepEvents(TrainerCallback):
    """Forwards events of the loop to the trainer."""

    def __init__(self, trainer: MixLoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Set the Trainer's step counters: steps count from the beginning of the run, including
        those before a resume."""
        # Steps count from the beginning of the run, including those before a resume.
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
