"""Intervals and marks against simulated truth; `tests/checks/calibration.py` draws more often."""

from __future__ import annotations

import json

import pytest
from simulated import World, coverage, false_calls

from mixlora_exp.config.paths import RESULTS

TIMES = 150
LEAST = 0.90
"""Of 150 draws, fewer than 90 % hold the truth in one of 300 cases where 95 % should."""


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(World(items=200, seed=0.0), id="no luck", marks=pytest.mark.slow),
        pytest.param(World(items=200, seed=0.05), id="some luck", marks=pytest.mark.slow),
        pytest.param(World(items=200, seed=0.3, skill=(0.5, 0.2)), id="much luck"),
        pytest.param(World(seeds=5, items=300, seed=0.1), id="five seeds", marks=pytest.mark.slow),
        pytest.param(World(seeds=1, items=300, skill=(2.0, 1.6)), id="one seed"),
        pytest.param(World(items=200, cluster=4), id="clusters"),
        pytest.param(World(items=150, tasks=3, seed=0.1), id="three tasks"),
    ],
)
def test_intervals_hold_the_truth(world: World) -> None:
    found = coverage(world, TIMES)
    assert found.accuracy >= LEAST
    assert found.difference >= LEAST


def test_marks_of_a_family_are_seldom_false() -> None:
    plain, corrected = false_calls(World(items=150, seed=0.05), comparisons=8, times=60)
    assert plain > corrected
    assert corrected <= 0.12


def test_more_seeds_and_items_tell_more() -> None:
    few, many = (
        coverage(World(seeds=n, items=m, seed=0.05, skill=(0.5, 0.3)), 60)
        for n, m in ((2, 200), (5, 800))
    )
    assert many.rejected > few.rejected
    assert many.width < few.width


def test_the_committed_figures_cover_as_they_say() -> None:
    found = json.loads((RESULTS / "calibration.json").read_text(encoding="utf-8"))
    assert found["draws"] >= 1000
    for row in found["coverage"]:
        # Three standard errors of the number of draws below 95 %.
        assert row["accuracy"] >= 0.935, row
        assert row["difference"] >= 0.935, row
    assert all(row["corrected"] <= 0.065 for row in found["false_calls"])
