"""Training: the transformers Trainer, with what MixLoRA needs to be seen."""

from __future__ import annotations

from mixlora_exp.training.fit import NotEnoughMemory, TrainSummary, fit
from mixlora_exp.training.halving import fit_halving
from mixlora_exp.training.joint.fit_joint import fit_jointly, make_job
from mixlora_exp.training.trainer import MixLoraTrainer

__all__ = [
    "MixLoraTrainer",
    "NotEnoughMemory",
    "TrainSummary",
    "fit",
    "fit_halving",
    "fit_jointly",
    "make_job",
]
