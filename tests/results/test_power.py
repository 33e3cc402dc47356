"""The smallest difference of a design, against closed forms and against what the tables do."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mixlora_exp.cli import power
from mixlora_exp.cli.main import main
from mixlora_exp.results.power import (
    average_item_error,
    detection_rate,
    seed_spread,
    smallest_detectable,
)
from mixlora_exp.results.statistics.estimates import compare
from mixlora_exp.results.statistics.parts import difference_part

ITEMS = {"a": 400, "b": 900}


def test_item_error_is_that_of_independent_tasks() -> None:
    error = average_item_error({"a": 0.1, "b": 0.2}, ITEMS)
    assert error == pytest.approx(math.sqrt(0.1 / 400 + 0.2 / 900) / 2)


def test_without_spread_of_seeds_it_is_the_textbooks() -> None:
    """(1.96 + 0.84) standard errors are seen with a probability of 80 %."""
    found = smallest_detectable(0.01, 0.0, seeds=3)
    assert found == pytest.approx(2.8 * 0.01, abs=1e-3)
    assert detection_rate(0.0, 0.01, 0.0, seeds=3) == pytest.approx(0.05, abs=0.01)


def test_more_seeds_see_smaller_differences() -> None:
    found = [smallest_detectable(0.004, 0.01, seeds=n) for n in (3, 5, 10)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
    # Where nothing differs, an interval leaves out zero no more often than it may.
    assert detection_rate(0.0, 0.004, 0.01, seeds=3) <= 0.055


def test_it_predicts_what_the_tables_intervals_do() -> None:
    """Two simulated methods whose items flip independently: the share of clear intervals."""
    draw = np.random.default_rng(3)
    changed, gain, seeds, clear, times = 0.1, 0.04, 3, 0, 120
    for _ in range(times):
        pairs = []
        for n in ITEMS.values():
            base = draw.random(n) < 0.5
            sides = []
            for extra in (gain, 0.0):
                side = {}
                for seed in range(seeds):
                    # Each answer is turned over with a probability that lets two seeds differ on
                    # `changed` of the items; the better method mends some of its wrong ones.
                    turned = base ^ (draw.random(n) < changed / 2)
                    better = turned | (draw.random(n) < 2 * extra)
                    side[seed] = {str(i): float(v) for i, v in enumerate(better)}
                sides.append(side)
            pairs.append(difference_part(*sides, {}, binary=True))
        clear += compare(*pairs).p <= 0.05
    foretold = detection_rate(
        gain,
        average_item_error(dict.fromkeys(ITEMS, (changed + gain) / seeds), ITEMS),
        seed_spread(changed, ITEMS),
        seeds,
    )
    # The formula takes the items' error for shared by all seeds, so it may foretell too little.
    assert clear / times >= foretold - 0.1


def test_no_task_in_common(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = SimpleNamespace(name="a", scores={("arc_e", "label_logits"): None})
    monkeypatch.setattr(power, "find_record", Path)
    monkeypatch.setattr(power, "check_run", lambda files: run)
    assert main(["power", "x", "y"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: a and a have no task in common under answer_text: give")
    assert told.count("\n") == 1
