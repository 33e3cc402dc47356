"""The items that a recorded run was scored on, read again from its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixlora_exp.config.recorded import rebuilt
from mixlora_exp.config.schema import DataSource
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.runs.inputs import Inputs, scored_split


def scored_items(record: Mapping[str, Any], task: str, data: Path | None = None) -> list[Any]:
    """Return the items of a task, in the order in which the record's predictions are written.
    `data`: the folder of the data's files now, if they are elsewhere than the record says.

    Raises:
        UserError: the data cannot be read, or are not those that were scored.
    """
    config = rebuilt(record["config"])
    if data is not None:
        kind = config.data.name if config.data.name is DataSource.chat else DataSource.local
        moved = dataclasses.replace(config.data, name=kind, path=str(data), mirror=None)
        config = dataclasses.replace(config, data=moved)
    split = "train" if config.evaluation.held_out else "test"
    loaded = load_split(config.data, task, split, config.task.custom)
    known = [file["sha256"] for file in record["data"].get(f"{task}/{split}", ())]
    if known != [file.sha256 for file in loaded.files]:
        raise UserError(f"{task}: the data are not those that were scored (their hashes differ)")
    return scored_split(config, Inputs({(task, split): loaded}, {}), task).items
