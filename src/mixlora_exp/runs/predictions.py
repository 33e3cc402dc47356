"""Writes the scores of a run: summary values for the record, predictions per item as JSON lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixlora_exp.evaluation import TaskScore
from mixlora_exp.records.record import write_jsonl
from mixlora_exp.records.required_fields import predictions_name


def score_entry(score: TaskScore) -> dict[str, Any]:
    """Return a task's score as the record holds it: all fields but the items."""
    entry = dataclasses.asdict(dataclasses.replace(score, items=[]))
    del entry["items"]
    return entry


def write_predictions(folder: Path, scores: Sequence[TaskScore]) -> dict[str, str]:
    """Write one JSON line per item; returns file names by `task/protocol`."""
    names = {}
    for score in scores:
        name = predictions_name(score.task, score.protocol)
        write_jsonl(folder / name, [dataclasses.asdict(item) for item in score.items])
        names[f"{score.task}/{score.protocol}"] = name
    return names
