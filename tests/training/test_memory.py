"""What training needs is given back before scoring begins."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.runs import scoring
from mixlora_exp.training import MixLoraTrainer

WORDS = ["experiment=smoke", "data.train_limit=8", "evaluation.batch_check=0"]


@pytest.fixture(autouse=True)
def no_chance() -> Iterator[None]:
    """Cycles are collected where the program asks for it, not when it happens to be time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "words",
    [["method=mixdora"], ["tracker=tensorboard"], ["adapters=[mixlora,lora]"]],
    ids=["one", "tracked", "two"],
)
def test_trainer_optimizer_and_jobs_are_gone_before_scoring(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: dict[str, weakref.ref] = {}
    alive: list[list[str]] = []
    real, score = MixLoraTrainer.training_step, scoring.score_tests

    def training_step(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        moments = self.optimizer.optimizer.state
        tensors = [value for state in moments.values() for value in state.values()]
        left.update(trainer=weakref.ref(self), optimizer=weakref.ref(self.optimizer.optimizer))
        left.update({f"job {name}": weakref.ref(job) for name, job in self.jobs.items()})
        left.update({f"moment {i}": weakref.ref(value) for i, value in enumerate(tensors)})
        return found

    def score_tests(*args, **kwargs):
        alive.append([name for name, reference in left.items() if reference() is not None])
        return score(*args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "training_step", training_step)
    monkeypatch.setattr(scoring, "score_tests", score_tests)
    assert execute([*WORDS, *words, f"output_dir={tmp_path}"]) == 0
    assert len(left) > 50
    assert alive
    assert not any(alive)
