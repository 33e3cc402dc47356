"""Cells of sweeps composed by group: equal to those composed whole, with few compositions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.config import command
from mixlora_exp.config.command import load, plan_runs
from mixlora_exp.config.resolve import open_session
from mixlora_exp.sweeps import compose_cells
from mixlora_exp.sweeps.compose_cells import ByGroup
from mixlora_exp.sweeps.status import SWEEPS, find_cells

TINY = ["model=tiny", "data=embedded"]


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fills with the command lines that Hydra composes for `ByGroup`."""
    composed: list[Any] = []

    def counted(*args: Any) -> Any:
        composed.append(args[2])
        return load(*args)

    monkeypatch.setattr(command, "load", counted)
    monkeypatch.setattr(compose_cells, "load", counted)
    return composed


@pytest.mark.parametrize(
    ("swept", "count"),
    [
        # The sweep, the first cell, another method, another task; ranks are set in the results.
        (["method=lora,mixlora", "task=arc_e,multi", "method.rank=2,4"], 4),
        # Fields of other groups take a preset's values: both cells of the second one whole.
        (["preset=correct,official", "method=lora,mixlora"], 5),
        # Both change `data`.
        (["scale=full,cpu", "data.forms=[label],[text]"], 5),
        # The number of experts is also HydraLoRA's top_k: all whole.
        (["method=hydralora,mixlora", "method.num_experts=3,4"], 7),
    ],
    ids=["separable", "a preset", "a shared field", "a field that others read"],
)
def test_cells_by_group_are_those_composed_whole(
    swept: list[str], count: int, compositions: list[Any]
) -> None:
    given = [*TINY, *swept]
    with open_session() as session:
        expected = plan_runs(session, "config", given, True).cells
        compositions.clear()
        composer = ByGroup()
        found = plan_runs(session, "config", given, True, composer.cell, composer.sweep).cells
    assert found == expected
    assert len(compositions) == count


def test_each_choice_of_all_sweeps_is_composed_once(
    tmp_path: Path, compositions: list[Any]
) -> None:
    # The defaults that folders' names leave out are composed once in a process, one a method.
    find_cells(["table2"], [], tmp_path)
    compositions.clear()
    found = find_cells(list(SWEEPS), [], tmp_path)
    assert len(found) > 300
    # The sweep, the first cell, 3 other methods, 8 other tasks, 4 other models, `scale=cpu`.
    assert len(compositions) == 18


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_all_sweeps_are_those_composed_whole(name: str) -> None:
    composer = ByGroup()
    with open_session() as session:
        for words in SWEEPS[name]:
            given = [f"experiment={name}", *words]
            whole = plan_runs(session, "config", given, False)
            assert plan_runs(session, "config", given, True, composer.cell, composer.sweep) == whole
