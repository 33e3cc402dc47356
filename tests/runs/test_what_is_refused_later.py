"""A run that no table will use says so before it begins, not when it is collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mixlora_exp.config.schema import Config
from mixlora_exp.plans import plan_text as planning
from mixlora_exp.results.collect import collect
from mixlora_exp.runs import run as experiment

Configure = Callable[..., Config]
RANDOM = "random weights: its scores mean nothing"
CHANGED = {"commit": "c", "dirty": True, "changed": [f"src/{n}.py" for n in "abcde"], "diff": "+"}
CLEAN = {"commit": "c", "dirty": False}


@pytest.mark.parametrize(
    ("git", "model", "told"),
    [
        (CLEAN, "smollm2_135m", None),
        (CLEAN, "tiny", RANDOM),
        (None, "smollm2_135m", "code in no git checkout"),
        (CHANGED, "smollm2_135m",
         "uncommitted changes in src/a.py, src/b.py, src/c.py and 2 more"),
        (CHANGED, "tiny",
         f"uncommitted changes in src/a.py, src/b.py, src/c.py and 2 more; {RANDOM}"),
    ],
)  # fmt: skip
def test_it_is_reported_in_a_plan_and_in_the_first_line(
    git: dict[str, Any] | None,
    model: str,
    told: str | None,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(planning, "git_state", lambda root: git)
    config = configure(f"model={model}", "dry_run=true")
    experiment.run(config)
    shown = capsys.readouterr().out.splitlines()
    lines = [line for line in shown if "make collect" in line]
    expected = [] if told is None else [f"{'record':<12}make collect will not take it: {told}"]
    assert lines == expected
    first = planning.first_line("NAME", config, None)
    reason = "" if told is None else f" (make collect will not take it: {told})"
    assert first == f"Run NAME{reason}"


def test_an_adapter_of_other_code_is_reported_too(configure: Configure) -> None:
    config = configure("model=smollm2_135m")
    for adapter, told in (
        ({"trained_by": None}, "origin unknown: no record has the hash of its adapter"),
        ({"trained_by": {"git": CHANGED}}, "an adapter that was trained with uncommitted changes"),
    ):
        assert told in planning.first_line("NAME", config, adapter)


def test_what_was_announced_is_what_comes(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("method=none")
    path = experiment.run(config)
    assert path is not None
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"Run {path.parent.name} (make collect will not take it: ")
    found = collect(path.parent.parent, path.parent.parent.parent / "runs")
    assert RANDOM in first
    assert (found.packed, found.random, found.refused) == ([], 1, [])
