"""Whole runs scored with shuffled experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mixlora_exp.cli.evaluate import run as evaluate
from mixlora_exp.errors import UserError
from mixlora_exp.records.record import read_record
from mixlora_exp.runs import run as experiment
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
@pytest.mark.parametrize("method", ["lora", "moslora", "none"])
def test_nothing_to_shuffle(
    method: str, dry_run: str, configure: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "load_model", None)
    words = [f"method={method}", "evaluation.shuffle_experts=1", f"dry_run={dry_run}"]
    with pytest.raises(UserError, match=f"shuffle_experts=1: {method} has no router"):
        experiment.run(configure(*words))


def test_an_adapter_without_experts_is_not_shuffled(finished: Start, configure: Start) -> None:
    adapter = finished("method=moslora").folder / "adapter"
    words = ["method=none", f"adapter={adapter}", "evaluation.shuffle_experts=1"]
    with pytest.raises(UserError, match="shuffle_experts=1: moslora has no router"):
        experiment.run(configure(*words))
