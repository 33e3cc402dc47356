"""Facts of the published data that records may not hold: most frequent answers of the training
splits, and which scored items depend on one another (`facts/*.csv`).

`tests/checks/data_facts.py` writes the files from the data.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.tasks import TASKS

FOLDER = Path(__file__).parent / "facts"


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


def majority_of_train(task: str) -> float | None:
    """Return the share of the most frequent answer in the published training split; None where it
    is not known."""
    return _majorities().get(task)


def published(run: RecordedRun, task: str) -> bool:
    """Return whether a run scored items of the published test split."""
    if run.held_out or run.scored["data"]["name"] == "embedded" or task not in TASKS:
        return False
    files = run.record["data"].get(f"{task}/test", ())
    return sum(file["rows"] for file in files) == TASKS[task].sizes["test"]


def groups(run: RecordedRun, task: str, protocol: str) -> Mapping[str, str]:
    """Item -> cluster, for items that depend on another one: by the record, or for the published
    test splits of records that do not say."""
    if run.scored["data"]["name"] == "embedded":
        return {}
    recorded = run.scores[task, protocol].get("clusters")
    if recorded is not None:
        return recorded
    return _clusters().get(task, {}) if published(run, task) else {}


def reference(run: RecordedRun, task: str, protocol: str) -> float:
    """Return the accuracy that a model without knowledge reaches: by chance, or by always giving
    the most frequent answer of the training split (of the scored items where that is not known)."""
    score = run.scores[task, protocol]
    known = _majorities().get(task) if published(run, task) else None
    return max(score["chance"], score["majority_class"] if known is None else known)
