"""Train an adapter, reload it, score it: `python train.py method=mixlora model=... task=multi`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.hydra_command import dispatch
from mixlora_exp.system.guarded import guarded


def with_base(overrides: Sequence[str]) -> list[str]:
    """The overrides; before them the words that choose the base model of an adapter that is
    scored, where none were given."""
    given = dict(line.split("=", 1) for line in overrides if "=" in line)
    folder = Path(given.get("adapter", "null").strip("'\"")).expanduser()
    # What else may be wrong with it is told when the configuration is there.
    if given.get("method") != "none" or "experiment" in given or not folder.is_dir():
        return list(overrides)
    from mixlora_exp.runs.base_choice import base_words

    return [*base_words(folder, given), *overrides]


def run(argv: Sequence[str]) -> int:
    """Carry out one command line; returns the exit code."""
    return dispatch(argv, "config", with_base)


def execute(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    0: done; 2: a mistake of the user's, told in one message; 130: interrupted; 1: runs of a sweep
    crashed. A crash outside of a sweep is raised, for Python to print it and exit with 1.
    """
    return guarded(run, argv)
