"""Which runs no table takes, by what is known before a run."""

from __future__ import annotations

import pytest

from mixlora_exp.records.objections import UNPLACED, has_random_weights, objections

CLEAN = {"commit": "c", "dirty": False}


def record(model: dict, git: dict | None = CLEAN, **more: object) -> dict:
    return {"config": {"model": model}, "provenance": {"git": git}, **more}


@pytest.mark.parametrize(
    ("weights", "path", "source", "random"),
    [
        ("random", "/model", "hub", True),
        ("random", None, "pypi", True),
        ("source", None, "random", True),
        ("source", "/model", "random", False),
        ("source", None, "hub", False),
    ],
)
def test_random_weights_are_a_trial(
    weights: str, path: str | None, source: str, random: bool
) -> None:
    made = record({"weights": weights, "path": path, "source": source})
    assert has_random_weights(made) is random
    assert objections(made) == (["random weights: its scores mean nothing"] if random else [])


def test_code_is_named_of_the_run_and_of_its_adapter() -> None:
    real = {"weights": "source", "path": None, "source": "hub"}
    assert objections(record(real, None)) == ["code in no git checkout"]
    assert objections(record(real, {"dirty": True})) == ["uncommitted changes"]
    dirty = {"dirty": True, "changed": ["a", "b", "c"]}
    assert objections(record(real, dirty)) == ["uncommitted changes in a, b, c"]
    dirty["changed"] = ["a", "b", "c", "d", "e"]
    assert objections(record(real, dirty)) == ["uncommitted changes in a, b, c and 2 more"]
    assert objections(record(real, adapter={"trained_by": {"git": CLEAN}})) == []
    assert objections(record(real, adapter={"trained_by": None})) == [UNPLACED]
    assert objections(record(real, adapter={"trained_by": {"git": None}})) == [
        "an adapter that was trained with code in no git checkout"
    ]
