"""Facts of the published data that records do not hold: most frequent answers of the training
splits, and which scored items depend on one another (`results/data/*.csv`).

`tests/checks/data_facts.py` writes the files from the data.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from functools import cache

from mixlora_exp.config.paths import RESULTS
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.tasks import TASKS, Item

FOLDER = RESULTS / "data"


def cluster_key(item: Item) -> str:
    """Return a key that is equal for items that share a passage, a question, or (WinoGrande's
    twins) both candidates."""
    if item.task == "winogrande":
        return "\n".join(sorted(item.options))
    return item.context or item.question


def clusters(items: Iterable[Item]) -> dict[str, str]:
    """Item -> first item of its cluster, for the clusters of more than one item."""
    by_key: dict[str, list[str]] = {}
    for item in items:
        by_key.setdefault(cluster_key(item), []).append(item.id)
    return {own: ids[0] for ids in by_key.values() if len(ids) > 1 for own in ids}


@cache
def _clusters() -> Mapping[str, Mapping[str, str]]:
    found: dict[str, dict[str, str]] = {}
    with (FOLDER / "clusters.csv").open(newline="", encoding="utf-8") as stream:
        for line in csv.DictReader(stream):
            found.setdefault(line["task"], {})[line["item"]] = line["cluster"]
    return found


@cache
def _majorities() -> Mapping[str, float]:
    with (FOLDER / "majority.csv").open(newline="", encoding="utf-8") as stream:
        return {
            line["task"]: int(line["most"]) / int(line["rows"]) for line in csv.DictReader(stream)
        }


def majority_of_train(task: str) -> float:
    """Return the share of the most frequent answer in the published training split."""
    return _majorities()[task]


def published(run: RecordedRun, task: str) -> bool:
    """Return whether a run scored items of the published test split."""
    if run.held_out or run.scored["data"]["name"] == "embedded" or task not in TASKS:
        return False
    files = run.record["data"].get(f"{task}/test", ())
    return sum(file["rows"] for file in files) == TASKS[task].sizes["test"]


def groups(run: RecordedRun, task: str) -> Mapping[str, str]:
    """Item -> cluster, for items that share a passage or a question with another one."""
    return _clusters().get(task, {}) if published(run, task) else {}


def reference(run: RecordedRun, task: str, protocol: str) -> float:
    """Return the accuracy that a model without knowledge reaches: by chance, or by always giving
    the most frequent answer of the training split (of the scored items where that is not known)."""
    score = run.scores[task, protocol]
    known = _majorities().get(task) if published(run, task) else None
    return max(score["chance"], score["majority_class"] if known is None else known)
