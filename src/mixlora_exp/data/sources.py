"""Loads items from the chosen source: the hub, local files, or the built-in generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from mixlora_exp.config.schema import CustomTask, DataConfig, DataSource
from mixlora_exp.data.hub import load_hub
from mixlora_exp.data.loaded import DataFile, LoadedSplit, hash_rows
from mixlora_exp.data.local import load_local
from mixlora_exp.errors import UserError
from mixlora_exp.tasks import TASKS, custom_task

SPLITS = ("train", "test")


def load_split(
    config: DataConfig, task: str, split: str, custom: Mapping[str, CustomTask] | None = None
) -> LoadedSplit:
    """Return all items of a task's `train` or `test` split, in the official order. `custom`: custom
    tasks by name, which are only read from local files.

    Raises:
        UserError: the split cannot be loaded, or a row is not valid.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    match config.name:
        case DataSource.hub:
            return load_hub(config.mirror, task, split)
        case DataSource.local | DataSource.chat:
            # `DataConfig` has checked that they come with a path.
            own = (custom or {}).get(task)
            if own is None:
                return load_local(str(config.path), TASKS[task], split)
            fields = {**asdict(own), "answer_as": own.answer_as.value}
            return load_local(str(config.path), custom_task(task, **fields), split)
        case DataSource.embedded:
            return _load_embedded(task, split, config.seed)


def _load_embedded(task: str, split: str, seed: int) -> LoadedSplit:
    from mixlora_exp.tasks import embedded

    rows = embedded.rows(task, split, seed)
    name, items = f"embedded:{task}/{split}?seed={seed}", []
    for index, row in enumerate(rows):
        try:
            items.append(TASKS[task].read(row, index))
        except ValueError as error:
            raise UserError(f"{name} row {index + 1}: {error}") from None
    return LoadedSplit(items, [DataFile(name, len(rows), hash_rows(rows))], rows)
