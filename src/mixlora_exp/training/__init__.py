"""Training of one or several adapters in one loop, based on transformers' Trainer."""

from __future__ import annotations

from mixlora_exp.training.fit import TrainSummary, fit, fit_jointly
from mixlora_exp.training.halve_micro_batch import fit_halving
from mixlora_exp.training.job import Job, make_job
from mixlora_exp.training.trainer import MixLoraTrainer

__all__ = [
    "Job",
    "MixLoraTrainer",
    "TrainSummary",
    "fit",
    "fit_halving",
    "fit_jointly",
    "make_job",
]
