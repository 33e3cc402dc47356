"""What of a run is scored, and how its scores are written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlora_exp.config import Config
from mixlora_exp.data.sources import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import TaskScore
from mixlora_exp.results.record import write_jsonl
from mixlora_exp.results.shape import predictions_name

if TYPE_CHECKING:
    # `inputs` checks with `scored_split` what runs will score.
    from mixlora_exp.inputs import Inputs

__all__ = ["score_entry", "scored_split", "write_predictions"]


def scored_split(config: Config, inputs: Inputs, task: str) -> LoadedSplit:
    """The items of a task that are scored.

    Raises:
        UserError: training leaves no row over.
    """
    limit, seed = config.evaluation.limit, config.data.seed
    if not config.evaluation.held_out:
        return inputs.splits[task, "test"].limited(limit, seed)
    trained = config.data.train_limit_of(task)
    found = inputs.splits[task, "train"].held_out(trained or 0, limit, seed)
    if not found.items:
        field = f"train_limits.{task}" if task in config.data.train_limits else "train_limit"
        raise UserError(
            f"data.{field}={trained} leaves no row of {task} over to score "
            "(evaluation.held_out=true): choose a smaller one"
        )
    return found


def score_entry(score: TaskScore) -> dict[str, Any]:
    entry = dataclasses.asdict(dataclasses.replace(score, items=[]))
    del entry["items"]
    return entry


def write_predictions(folder: Path, scores: Sequence[TaskScore]) -> dict[str, str]:
    """One JSON line per item; returns file names by task and protocol."""
    names = {}
    for score in scores:
        name = predictions_name(score.task, score.protocol)
        write_jsonl(folder / name, [dataclasses.asdict(item) for item in score.items])
        names[f"{score.task}/{score.protocol}"] = name
    return names
