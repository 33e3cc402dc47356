"""What the tests of whole runs share: one tiny run per method, and a way to start others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose

from mixlora_exp.config.schema import Config
from mixlora_exp.records.record import read_record
from mixlora_exp.runs import run as experiment

SMALL = [
    "experiment=smoke",
    "trainer.precision=float32",
    "data.train_limit=8",
    "evaluation.batch_check=2",
]


def config_for(folder: Path, *overrides: str) -> Config:
    return replace(compose([*SMALL, *overrides]), output_dir=str(folder))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Run:
    """A finished run and its record."""

    config: Config
    path: Path
    record: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.record = read_record(self.path)

    @property
    def folder(self) -> Path:
        return self.path.parent

    def predictions(self, key: str) -> list[dict[str, Any]]:
        return lines(self.folder / self.record["predictions"][key])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """The configuration of a small run whose results go to a temporary folder."""
    return lambda *overrides: config_for(tmp_path / "out", *overrides)


@pytest.fixture
def run(configure: Callable[..., Config]) -> Callable[..., Run]:
    """Carry out a small run."""

    def carry_out(*overrides: str) -> Run:
        config = configure(*overrides)
        path = experiment.run(config)
        assert path is not None
        return Run(config, path)

    return carry_out


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A small run with these overrides that is carried out once and only read."""
    runs: dict[tuple[str, ...], Run] = {}

    def get(*overrides: str) -> Run:
        if overrides not in runs:
            torch.set_num_threads(1)
            config = config_for(tmp_path_factory.mktemp("out"), *overrides)
            path = experiment.run(config)
            assert path is not None
            runs[overrides] = Run(config, path)
        return runs[overrides]

    return get
