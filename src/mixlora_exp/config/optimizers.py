"""Optimizers and schedules of the learning rate by transformers' names, and what is known of each
before anything loads."""

from __future__ import annotations

from dataclasses import dataclass

FUSED_ADAMW = "adamw_torch_fused"


@dataclass(frozen=True, slots=True)
class OptimizerFacts:
    """What the plan and the checks need of an optimizer.

    state_bytes: of its state per trained element; of large parameters, small ones stay in float32.
    package: the Python package that has it, beside torch. matrices: whether it updates matrices
    alone. resumes: whether checkpoints hold its state. betas: whether it reads `trainer.betas`.
    """

    state_bytes: float = 8.0
    package: str | None = None
    matrices: bool = False
    resumes: bool = True
    betas: bool = True


# Blocks of 256 elements have a float32 scale for each of the two moments.
_EIGHT, _FOUR = 2 + 8 / 256, 1 + 8 / 256
OPTIMIZERS = {
    FUSED_ADAMW: OptimizerFacts(),
    "adamw_torch": OptimizerFacts(),
    "adamw_torch_8bit": OptimizerFacts(_EIGHT, "torchao", resumes=False),
    "adamw_torch_4bit": OptimizerFacts(_FOUR, "torchao", resumes=False),
    "adamw_bnb_8bit": OptimizerFacts(_EIGHT, "bitsandbytes", resumes=False),
    "paged_adamw_8bit": OptimizerFacts(_EIGHT, "bitsandbytes", resumes=False),
    "paged_adamw_32bit": OptimizerFacts(8.0, "bitsandbytes", resumes=False),
    "muon": OptimizerFacts(4.0, matrices=True, betas=False),
}
"""Values of `trainer.optim`. Quantised and paged states are no plain tensors, which a file would
not give back to the bit: a run with one has no checkpoints."""

SCHEDULES = {
    "constant": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "warmup_stable_decay": (
        "num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
}  # fmt: skip
"""Values of `trainer.schedule` -> the names in `trainer.schedule_options`, which are transformers'
`lr_scheduler_kwargs`."""
FLOORED = ("linear", "cosine")
"""Schedules to which `trainer.final_rate` applies."""
