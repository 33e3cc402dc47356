"""Where the items come from: the hub, local files, or the generator that ships with the code."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mixlora_exp.config.schema import DataConfig, DataSource
from mixlora_exp.data.hub import load_hub
from mixlora_exp.data.loaded import DataFile, LoadedSplit, hash_rows
from mixlora_exp.data.local import load_local
from mixlora_exp.tasks import TASKS, Item

__all__ = ["SPLITS", "DataFile", "LoadedSplit", "limit_items", "load_split"]

SPLITS = ("train", "test")


def load_split(config: DataConfig, task: str, split: str) -> LoadedSplit:
    """All items of a task's `train` or `test` split, in the official order.

    Raises `UserError` when the split cannot be had or one of its rows does not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    match config.name:
        case DataSource.hub:
            return load_hub(config.mirror, task, split)
        case DataSource.local:
            # `DataConfig` has checked that data=local comes with a path.
            return load_local(str(config.path), task, split)
        case DataSource.embedded:
            return _load_embedded(task, split, config.seed)


def limit_items(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """The first `limit` items of a shuffle by `seed`; with None, all in the given order."""
    if limit is None:
        return list(items)
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:limit]


def _load_embedded(task: str, split: str, seed: int) -> LoadedSplit:
    from mixlora_exp.tasks import embedded

    rows = embedded.rows(task, split, seed)
    items = [TASKS[task].parse(row, index) for index, row in enumerate(rows)]
    name = f"embedded:{task}/{split}?seed={seed}"
    return LoadedSplit(items, [DataFile(name, len(rows), hash_rows(rows))])
