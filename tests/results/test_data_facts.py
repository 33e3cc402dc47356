"""Most frequent answers and clusters of items: the committed files, against the data."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from mixlora_exp.data.local import load_local
from mixlora_exp.errors import UserError
from mixlora_exp.results.data_facts import FOLDER, clusters
from mixlora_exp.tasks import TASKS, Item

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def lines(name: str, task: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(newline="", encoding="utf-8") as stream:
        return [line for line in csv.DictReader(stream) if line["task"] == task]


def items(task: str, split: str) -> list[Item]:
    try:
        return load_local(str(DATA), TASKS[task], split).items
    except UserError:
        pytest.skip(f"the {split} rows of {task} are not beside this checkout")


@pytest.mark.parametrize("task", TASKS)
def test_the_most_frequent_answer_of_training(task: str) -> None:
    rows = items(task, "train")
    most = Counter(item.answer for item in rows).most_common(1)[0][1]
    (line,) = lines("majority.csv", task)
    assert (int(line["most"]), int(line["rows"])) == (most, len(rows))


@pytest.mark.parametrize("task", TASKS)
def test_items_that_depend_on_one_another(task: str) -> None:
    found = {line["item"]: line["cluster"] for line in lines("clusters.csv", task)}
    assert found == clusters(items(task, "test"))


def test_what_makes_a_cluster() -> None:
    def item(task: str, name: str, question: str, context: str = "", first: str = "x") -> Item:
        return Item(task, name, question, (first, "y"), 0, ("A", "B"), context)

    passages = [item("boolq", "a", "1?", "P"), item("boolq", "b", "2?", "P"),
                item("boolq", "c", "1?", "Q")]  # fmt: skip
    assert clusters(passages) == {"a": "a", "b": "a"}
    asked = [item("piqa", "a", "how?"), item("piqa", "b", "how?"), item("piqa", "c", "why?")]
    assert clusters(asked) == {"a": "a", "b": "a"}
    twins = [item("winogrande", "a", "It was _ ."), item("winogrande", "b", "It was not _ ."),
             item("winogrande", "c", "It was _ .", first="z")]  # fmt: skip
    assert clusters(twins) == {"a": "a", "b": "a"}
