"""Items that depend on one another: on made items, and on the published rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mixlora_exp.data.local import load_local
from mixlora_exp.tasks import TASKS, Item
from mixlora_exp.tasks.clusters import clusters

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def item(task: str, name: str, question: str, context: str = "", *options: str) -> Item:
    options = options or ("x", "y")
    return Item(task, name, question, options, 0, ("A", "B"), context)


@pytest.mark.parametrize("task", ["boolq", "siqa"])
def test_a_context_is_one_cluster(task: str) -> None:
    made = [item(task, "a", "1?", "P"), item(task, "b", "2?", "P"), item(task, "c", "1?", "Q")]
    assert clusters(made) == {"a": "a", "b": "a"}


def test_without_a_context_a_question_is() -> None:
    made = [item("piqa", "a", "how?"), item("piqa", "b", "how?"), item("piqa", "c", "why?")]
    assert clusters(made) == {"a": "a", "b": "a"}


def test_twins_are_one_sentence_with_two_fillings() -> None:
    def filled(name: str, question: str, *options: str) -> Item:
        return item("winogrande", name, question, "", *options)

    trophy = "The trophy does not fit into the case because the _ is too {}."
    other = "Ann polished a trophy and laid it on velvet before the _ was closed."
    made = [
        filled("a", trophy.format("large"), "trophy", "case"),
        filled("other", other, "trophy", "case"),
        filled("b", trophy.format("small"), "Case", "trophy"),
        filled("names", trophy.format("large"), "box", "case"),
    ]
    assert clusters(made) == {"a": "a", "b": "a"}


def rows(task: str) -> list[dict]:
    path = DATA / task / "train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the training rows of {task} are not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_twins_of_the_published_rows_are_those_that_their_names_say() -> None:
    by_name: dict[str, list[int]] = {}
    for number, row in enumerate(rows("winogrande")):
        by_name.setdefault(row["qID"].rpartition("-")[0], []).append(number)
    named = [tuple(pair) for pair in by_name.values() if len(pair) == 2]
    items = load_local(str(DATA), TASKS["winogrande"], "train").items
    found = clusters(items)
    place = [found.get(item.id, item.id) for item in items]
    assert len(named) == 2011
    assert sum(place[first] == place[second] for first, second in named) == 2011
    # Near-copies of a sentence under other names: 19 items more than the pairs have.
    assert (len(found), len(set(found.values()))) == (2 * 2011 + 19, 2013)


def test_situations_of_the_published_rows() -> None:
    contexts = [row["context"] for row in rows("siqa")]
    found = clusters(load_local(str(DATA), TASKS["siqa"], "train").items)
    assert len(contexts) - len(found) + len(set(found.values())) == len(set(contexts)) == 33000
    assert (len(found), len(set(found.values()))) == (820, 410)
