"""The embedded tasks: valid, balanced, reproducible, with nothing of the test in the training."""

from __future__ import annotations

import socket
from collections import Counter

import pytest

from mixlora_exp.config.schema import TASK_NAMES
from mixlora_exp.tasks import TASKS, Item
from mixlora_exp.tasks.embedded import facts_used, rows

SPLITS = ("train", "test")


def items(task: str, split: str, seed: int = 0) -> list[Item]:
    return [TASKS[task].parse(row, i) for i, row in enumerate(rows(task, split, seed))]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the embedded data opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("task", TASK_NAMES)
def test_rows_parse_and_answers_are_balanced(task: str, seed: int) -> None:
    for split, size in (("train", 360), ("test", 96)):
        made = items(task, split, seed)
        assert len(made) == size
        assert all(len(set(item.options)) == len(item.options) for item in made)
        places = Counter(item.answer for item in made)
        assert len(places) == len(made[0].options)
        assert max(places.values()) - min(places.values()) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_no_test_fact_is_trained_on_in_any_task(seed: int) -> None:
    train = set().union(*(facts_used(task, "train", seed) for task in TASK_NAMES))
    test = set().union(*(facts_used(task, "test", seed) for task in TASK_NAMES))
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("task", TASK_NAMES)
def test_no_question_is_in_both_splits(task: str) -> None:
    train, test = (
        {(item.context, item.question, frozenset(item.options)) for item in items(task, split)}
        for split in SPLITS
    )
    assert not train & test


@pytest.mark.parametrize("task", [task for task in TASK_NAMES if task != "boolq"])
@pytest.mark.parametrize("split", SPLITS)
def test_an_option_is_right_as_often_as_chance_has_it(task: str, split: str) -> None:
    made = items(task, split)
    shown = Counter(option for item in made for option in item.options)
    right = Counter(item.options[item.answer] for item in made)
    options = len(made[0].options)
    assert all(right[option] * options == count for option, count in shown.items())


@pytest.mark.parametrize("task", [task for task in TASK_NAMES if task != "boolq"])
def test_the_longest_option_is_no_better_guess_than_chance(task: str) -> None:
    made = items(task, "train")
    hits = sum(len(item.options[item.answer]) == max(map(len, item.options)) for item in made)
    ties = sum(sum(len(o) == max(map(len, i.options)) for o in i.options) - 1 for i in made)
    chance = (len(made) + ties) / len(made[0].options)
    assert abs(hits - chance) <= 0.1 * len(made)


@pytest.mark.parametrize("split", SPLITS)
def test_boolq_passages_settle_their_questions(split: str) -> None:
    for item in items("boolq", split):
        if "capital" not in item.question:
            asked = item.question.split()[-1]
            assert (asked in item.context.lower()) == (item.answer == 0), item


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_seed_alone_decides(task: str) -> None:
    assert rows(task, "test", 3) == rows(task, "test", 3)
    assert rows(task, "test", 3) != rows(task, "test", 4)
