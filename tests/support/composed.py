"""Configurations that many tests ask for, each composed once in a process: it takes Hydra 0.1 s."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

from mixlora_exp.config import command


@cache
def _composed(overrides: tuple[str, ...]) -> Any:
    return command.compose(overrides)


def compose(overrides: Sequence[str] = ()) -> Any:
    """A copy of the configuration that `config.command.compose` gives, which a test may change."""
    return copy.deepcopy(_composed(tuple(overrides)))
