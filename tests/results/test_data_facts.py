"""Most frequent answers and clusters of items: the committed files, against the data."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mixlora_exp.data.local import load_local
from mixlora_exp.errors import UserError
from mixlora_exp.results.build import gather
from mixlora_exp.results.data_facts import FOLDER, groups
from mixlora_exp.results.paper import BOOLQ_TRUE
from mixlora_exp.results.statistics.parts import interval
from mixlora_exp.results.tables.paired import cell
from mixlora_exp.tasks import TASKS, Item
from mixlora_exp.tasks.clusters import clusters

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
    if len(rows) != TASKS[task].sizes["train"]:
        # Beside this checkout is a part of HellaSwag's split: nothing is known of all of it.
        assert lines("majority.csv", task) == []
        return
    most = Counter(item.answer for item in rows).most_common(1)[0][1]
    (line,) = lines("majority.csv", task)
    assert (int(line["most"]), int(line["rows"])) == (most, len(rows))


def test_the_majority_of_boolq() -> None:
    assert sum(item.answer == 0 for item in items("boolq", "test")) == BOOLQ_TRUE


@pytest.mark.parametrize("task", TASKS)
def test_items_that_depend_on_one_another(task: str) -> None:
    found = {line["item"]: line["cluster"] for line in lines("clusters.csv", task)}
    assert found == clusters(items(task, "test"))


def test_clusters_of_a_record_widen_its_intervals(add: Callable[..., Path], results: Path) -> None:
    def halved(record: dict) -> None:
        for score in record["scores"]:
            score["clusters"] = {f"{score['task']}-{i}": f"{score['task']}-{i // 20}"
                                 for i in range(40)}  # fmt: skip

    add("alone", 0.5)
    add("together", 0.5, "seed=2", change=halved)
    runs = {run.name: run for run in gather(results).runs}
    for run in runs.values():
        # The same answers: first half right, second half wrong.
        for number, row in enumerate(run.predictions["arc_e", "label_logits"].values()):
            row["prediction"] = 0 if number < 20 else 1
    own, shared = (
        interval([cell([runs[name]], "arc_e", "label_logits")]) for name in ("alone", "together")
    )
    assert len(groups(runs["together"], "arc_e", "label_logits")) == 40
    assert shared[1] - shared[0] > 2 * (own[1] - own[0])
