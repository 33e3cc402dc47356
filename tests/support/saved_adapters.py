"""Saves an adapter of each kind in a folder: `python saved_adapters.py FOLDER`, or by import."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mixlora_exp.adapters import attach_adapter, save_adapter
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.command import compose
from mixlora_exp.models import load_model

METHODS = PAPER_METHODS


def save_all(folder: Path) -> None:
    """As this project saves them, and beside them as PEFT does."""
    for method in METHODS:
        config = compose(["model=tiny", f"method={method}", "method.rank=2"])
        base = load_model(config.model, torch.float32, seed=1)
        model = attach_adapter(base, config.method, config.kernel, 0)
        save_adapter(model, folder / method)
        model.save_pretrained(folder / f"{method}-by-peft", save_embedding_layers=False)


if __name__ == "__main__":
    save_all(Path(sys.argv[1]))
