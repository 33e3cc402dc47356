"""What the official packages do when they score, each as a switch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.schema import ArcLabels, DataConfig, EvaluationConfig, Protocol
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation import TaskScore, score_tests

Make = Callable[..., Any]


def score(
    scorer: Any, items: list, data: DataConfig, arc_labels: ArcLabels = ArcLabels.own
) -> TaskScore:
    tests = {items[0].task: LoadedSplit(items, [])}
    evaluation = EvaluationConfig(batch_check=0, arc_labels=arc_labels)
    (found,) = score_tests(Protocol.label_logits, scorer, tests, data, evaluation)
    return found


@pytest.mark.parametrize("method", PAPER_METHODS)
def test_dropout_in_evaluation_is_drawn_from_the_seed(
    method: str, make_model: Make, data: DataConfig, items: Make, scorer: Make
) -> None:
    model, chosen = make_model(method), items("arc_e", 6)

    def logits(seed: int | None) -> list[list[float]]:
        return [item.scores for item in score(scorer(model, dropout_seed=seed), chosen, data).items]

    plain, first = logits(None), logits(1)
    assert first != plain
    assert first == logits(1)
    assert first != logits(2)
    assert logits(None) == plain, "the switch leaves nothing behind"
    # The model as a whole scores: there is no router loss in what it returns.
    assert not scorer(model, dropout_seed=1).model.training


def test_dropout_of_no_adapter_is_nothing(
    make_model: Make, data: DataConfig, items: Make, scorer: Make
) -> None:
    model, chosen = make_model("none"), items("arc_e", 4)
    found = [score(scorer(model, dropout_seed=seed), chosen, data).items for seed in (None, 1)]
    assert found[0] == found[1]


def test_nine_labels_let_a_label_win_that_the_item_does_not_have(
    make_model: Make, data: DataConfig, items: Make, scorer: Make
) -> None:
    model, chosen = make_model("none"), items("arc_e", 12)
    made = scorer(model)
    own, nine = (score(made, chosen, data, labels) for labels in (ArcLabels.own, ArcLabels.nine))
    assert own.unparsed is None
    for before, after, item in zip(own.items, nine.items, chosen, strict=True):
        assert after.scores == before.scores
        assert "E" not in item.labels
        assert after.prediction in (before.prediction, None)
    assert nine.unparsed == sum(item.prediction is None for item in nine.items)


def test_a_winning_label_of_another_item_is_no_answer(
    make_model: Make, data: DataConfig, items: Make, scorer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, chosen = scorer(make_model("none")), items("arc_e", 4)
    (other,) = made.tokenizer(" E", add_special_tokens=False)["input_ids"]
    whole = made.logits

    def raised(*args: Any) -> torch.Tensor:
        found = whole(*args)
        found[..., other] = 1e4
        return found

    monkeypatch.setattr(made, "logits", raised)
    nine = score(made, chosen, data, ArcLabels.nine)
    assert (nine.accuracy, nine.unparsed) == (0.0, 4)
    assert score(made, chosen, data).unparsed is None


def test_a_label_of_several_tokens_counts_by_its_last(
    make_model: Make, data: DataConfig, items: Make, scorer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, chosen = scorer(make_model("none")), items("arc_e", 4)
    ids = made.tokenizer(" 1", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1, "this tokenizer splits digits off"
    whole = made.logits

    def raised(*args: Any) -> torch.Tensor:
        found = whole(*args)
        found[..., ids[-1]] = 1e4
        return found

    monkeypatch.setattr(made, "logits", raised)
    assert score(made, chosen, data, ArcLabels.nine).unparsed == 4


def test_nine_labels_concern_arc_alone(
    make_model: Make, data: DataConfig, items: Make, scorer: Make
) -> None:
    model, chosen = make_model("mixlora"), items("piqa", 6)
    found = [score(scorer(model), chosen, data, labels) for labels in ArcLabels]
    assert found[0].items == found[1].items
