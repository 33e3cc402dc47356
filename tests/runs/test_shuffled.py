"""Whole runs scored with shuffled experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mixlora_exp.cli.evaluate import run as evaluate
from mixlora_exp.errors import UserError
from mixlora_exp.records.record import read_record
from mixlora_exp.runs import run as experiment
from mixlora_exp.runs import state
from mixlora_exp.system.exit_codes import guarded

Start = Callable[..., Any]


def test_shuffled_experts_are_another_condition(finished: Start, tmp_path) -> None:
    trained = finished("method=mixlora", "trainer.learning_rate=0.02")
    scores = {}
    for name, words in {"plain": [], "shuffled": ["evaluation.shuffle_experts=3"]}.items():
        given = [f"run={trained.folder}", f"output_dir={tmp_path / name}", *words]
        assert guarded(evaluate, given) == 0
        (path,) = (tmp_path / name).glob("*/record.json")
        record = read_record(path)
        scores[name] = record["scores"][0]["gold_log_likelihood"]
    assert scores["plain"] == trained.record["scores"][0]["gold_log_likelihood"]
    assert scores["shuffled"] != scores["plain"]
    assert record["config"]["evaluation"]["shuffle_experts"] == 3
    assert record["adapter"]["trained_by"]["name"] == trained.folder.name


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("lora", "has no router"), ("moslora", "has no router"), ("none", "has no router"),
        ("mixlora_uniform", "gives all experts the same weight"),
        ("mola method.router=uniform", "gives all experts the same weight"),
        ("mixlora_one_expert", "has one expert"),
        ("mola method.num_experts=1/1 method.top_k=1", "has one expert"),
    ],
)  # fmt: skip
def test_nothing_to_shuffle(
    method: str, why: str, dry_run: str, configure: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "load_model", None)
    method, *more = method.split()
    words = [f"method={method}", *more, "evaluation.shuffle_experts=1", f"dry_run={dry_run}"]
    with pytest.raises(UserError, match=f"shuffle_experts=1: {method} {why}"):
        experiment.run(configure(*words))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=moslora"], "moslora has no router"),
        (["method=mixlora_one_expert"], "mixlora has one expert"),
        (["method=mola", "method.router=uniform"], "mola gives all experts the same weight"),
    ],
)
def test_adapters_with_nothing_to_shuffle(
    finished: Start, configure: Start, words: list[str], told: str
) -> None:
    adapter = finished(*words).folder / "adapter"
    words = ["method=none", f"adapter={adapter}", "evaluation.shuffle_experts=1"]
    with pytest.raises(UserError, match=f"shuffle_experts=1: {told}"):
        experiment.run(configure(*words))
