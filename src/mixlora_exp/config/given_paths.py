"""Checks that the folders named on a command line exist or can be made, before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mixlora_exp.config.checks import require_short
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError

HUB = "hub:"
"""Beginning of the name of an adapter on the hub, which stands in place of a folder."""
WAYS = {
    "adapter": "give one that PEFT or train.py wrote",
    "model.path": "give one with a model in the transformers format",
    "data.path": "give one that holds TASK/SPLIT.jsonl, or use data=hub or data=embedded",
    "data.mirror": "give one with the downloaded repositories, or use `data=local data.path=DIR`",
}


def check_folders(given: Iterable[tuple[str, str | None]]) -> None:
    """Check pairs of a field and the folder that it names, or None.

    Raises:
        UserError: there is no such folder, or it is a file.
    """
    for name, value in given:
        if value is None or (name == "adapter" and value.startswith(HUB)):
            continue
        if not Path(value).expanduser().is_dir():
            state = "is not a folder" if Path(value).expanduser().exists() else "does not exist"
            raise UserError(f"{name}={value} {state}: {WAYS[name]}")


def check_given(config: Config) -> None:
    """Check the folders that a run's configuration names.

    Raises:
        UserError: one is not there, or the name of the one to be made is too long.
    """
    require_short("output_dir", str(Path(config.output_dir).expanduser()))
    check_folders(
        [
            ("data.path", config.data.path),
            ("data.mirror", config.data.mirror),
            ("model.path", config.model.path),
            ("adapter", config.adapter),
        ]
    )
