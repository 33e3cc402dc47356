"""What the tests of training share: a small training run whose parts can be looked at."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from composed import compose
from host_reads import host_reads

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example, encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.training import MixLoraTrainer, TrainSummary, fit

# The package gives the name of this module to the function inside it.
FIT = importlib.import_module("mixlora_exp.training.fit")
SMALL = [
    "experiment=smoke",
    "trainer.precision=float32",
    "data.train_limit=16",
    "method.rank=4",
    "method.alpha=8",
]


@dataclass
class Trained:
    """A finished training run."""

    config: Config
    summary: TrainSummary
    trainer: MixLoraTrainer
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    examples: list[Example]
    folder: Path

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.summary.curve]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def reads_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the host reads a tensor in the check of each optimizer step's gradients."""
    seen: list[int] = []
    own = MixLoraTrainer.check_gradients

    def watched(self) -> None:
        with host_reads() as reads:
            own(self)
        seen.append(reads.total())

    monkeypatch.setattr(MixLoraTrainer, "check_gradients", watched)
    return seen


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Trained]:
    """Train a tiny model with some overrides; `examples` stand in for the configured data."""
    kept: list[MixLoraTrainer] = []

    class Kept(MixLoraTrainer):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(FIT, "MixLoraTrainer", Kept)

    def run(
        *overrides: str,
        examples: list[Example] | None = None,
        folder: Path | None = None,
        attention: str = "eager",
    ) -> Trained:
        config = compose([*SMALL, *overrides])
        tokenizer = load_tokenizer(config.model)
        if examples is None:
            loaded = load_split(config.data, "arc_e", "train")
            items = loaded.limited(config.data.train_limit, config.data.seed).items
            examples = encode_examples(tokenizer, items, config.data)
        base = load_model(config.model, torch.float32, config.seed)
        base.set_attn_implementation(attention)
        model = attach_adapter(base, config.method, config.kernel, config.seed)
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in weights.items()}
        folder = tmp_path / f"run-{len(kept)}" if folder is None else folder
        folder.mkdir(exist_ok=True)
        summary = fit(
            config=config, model=model, tokenizer=tokenizer, examples=examples, folder=folder,
            dtype=torch.float32,
        )  # fmt: skip
        after = {name: p.detach().clone() for name, p in weights.items()}
        return Trained(config, summary, kept[-1], before, after, examples, folder)

    return run
