"""What the tests of the command line share: a stand-in for the runs, and the form of a refusal."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.config.command import compose
from mixlora_exp.config.schema import Config


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    """Stand in for `mixlora_exp.runs.run`: keep the configurations instead of running them."""
    configs: list[Config] = []
    module = types.ModuleType("mixlora_exp.runs.run")
    module.run = lambda config, **_: configs.append(config)
    monkeypatch.setitem(sys.modules, "mixlora_exp.runs.run", module)
    monkeypatch.chdir(tmp_path)
    return configs


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run a bad command line and return its message, checked for form."""

    def run(argv: list[str]) -> str:
        assert execute(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        return captured.err

    return run


@pytest.fixture(scope="session")
def base() -> Config:
    """The configuration of a command line without words."""
    return compose()
