"""Files of rows as users have them, and how a bad one is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.config.schema import DataConfig, DataSource
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError

GOOD = {"goal": "Dry a cup", "sol1": "Wet it.", "sol2": "Take a towel.", "label": 1}


def local(path: Path) -> DataConfig:
    return DataConfig(name=DataSource.local, path=str(path))


def write_lines(file: Path, *lines: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines)
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="utf-8") as stream:
        stream.write(text)
    return file


def refusal(config: DataConfig, task: str = "piqa", split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load_split(config, task, split)
    return str(caught.value)
