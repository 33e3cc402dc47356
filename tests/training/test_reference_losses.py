"""What ten small runs compute is what they computed before: to the bit on the same kind of CPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference_losses as reference
import torch
from reference_losses import (
    BFLOAT16,
    ELSEWHERE,
    EXACT,
    FILE,
    FLOAT32,
    RUNS,
    SMALL,
    drift,
    for_machine,
    kind_of_machine,
    numbers,
)

from mixlora_exp.config.paths import ROOT
from mixlora_exp.records.record import read_record

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the reference is of a CPU, and runs here are on a GPU"
)
KNOWN = read_record(FILE)


MADE = for_machine(KNOWN, kind_of_machine())


def tolerances(name: str) -> dict[str, float]:
    return ELSEWHERE[RUNS[name][-1]] if MADE is None else EXACT


@pytest.mark.parametrize("made", [KNOWN, *KNOWN.get("others", ())], ids=lambda one: str(
    one["machine"]["vendor_id"]))  # fmt: skip
def test_the_reference_has_all_runs(made: dict[str, Any]) -> None:
    """Of each kind of CPU, which agree with one another."""
    assert {name: run["words"] for name, run in made["runs"].items()} == {
        name: [*SMALL, *words] for name, words in RUNS.items()
    }
    assert len(RUNS) == 10
    for name, run in made["runs"].items():
        assert len(run["losses"]) == len(run["gradient_norms"]) == 20
        assert not drift(run, numbers(KNOWN["runs"][name]), ELSEWHERE[RUNS[name][-1]])


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_what_they_were(name: str) -> None:
    found = drift(reference.losses_of(*RUNS[name]), expected(name), tolerances(name))
    assert not found, (
        f"{name}: {found}. The code computes something else than before; if that is meant: "
        'make reference REASON="..."'
    )


def expected(name: str) -> dict[str, list[float]]:
    return numbers((MADE or KNOWN)["runs"][name])


def test_an_alpha_larger_by_a_thousandth_is_found() -> None:
    """To the bit, and also where only the tolerance of another kind of CPU holds."""
    changed = reference.losses_of(*RUNS["mixlora"], "method.alpha=8.008")
    assert drift(changed, expected("mixlora"), tolerances("mixlora"))
    for kind, values in expected("mixlora").items():
        assert drift(changed, {kind: values}, ELSEWHERE[FLOAT32]), kind


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has no vector units"
)
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_another_kind_of_cpu_is_within_its_tolerances(capability: str) -> None:
    """Without the wider vector units sums have another order, as on another CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-k", "losses_are or alpha", __file__],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "11 passed" in done.stdout


def test_drift_is_the_last_bit_and_more() -> None:
    known = {"losses": [1.0, 2.0], "gradient_norms": [3.0, 4.0]}
    assert not drift(known, known, EXACT)
    for name in known:
        odd = {**known, name: [known[name][0], math.nextafter(known[name][1], 9)]}
        assert drift(odd, known, EXACT).startswith(f"{name} of step 2")
        assert not drift(odd, known, ELSEWHERE[FLOAT32])
        assert drift({**known, name: [math.nan, known[name][1]]}, known, ELSEWHERE[BFLOAT16])


def test_made_anew_with_the_reason_in_the_changelog(tmp_path: Path, monkeypatch) -> None:
    file, log = tmp_path / "reference.json", tmp_path / "CHANGELOG.md"
    before = "## [Unreleased]\n\n### Changed\n\n- Older.\n\n## [0.1]\n\n### Changed\n\n- Old.\n"
    log.write_text(before)
    monkeypatch.setattr(reference, "losses_of", lambda *words: {"losses": [float(len(words))]})
    assert reference.remake("another rounding.", file, log) == 0
    assert read_record(file)["reason"] == "another rounding."
    entry = "- Reference losses made anew (all runs): another rounding."
    assert log.read_text() == before.replace("- Older.", f"{entry}\n- Older.")
    # Nothing changed: no second entry.
    assert reference.remake("again", file, log) == 0
    assert log.read_text().count("Reference") == 1
    monkeypatch.setitem(reference.RUNS, "mola", ("method=mola", "kernel=exact"))
    assert reference.remake("a router", file, log) == 0
    assert "made anew (mola): a router." in log.read_text()


def test_another_kind_of_cpu_is_added_if_it_agrees(tmp_path: Path, monkeypatch) -> None:
    file, log = tmp_path / "reference.json", tmp_path / "CHANGELOG.md"
    log.write_text("### Changed\n\n")

    def on(machine: str, loss: float) -> dict[str, Any]:
        monkeypatch.setattr(reference, "kind_of_machine", lambda: {"cpu": machine})
        monkeypatch.setattr(reference, "losses_of", lambda *words: {"losses": [loss]})
        assert reference.remake(machine, file, log) == 0
        return read_record(file)

    first = on("a", 1.0)
    both = on("b", 1.0 + 1e-7)
    assert both["runs"] == first["runs"]
    assert [one["machine"] for one in both["others"]] == [{"cpu": "b"}]
    assert for_machine(both, {"cpu": "b"})["runs"]["lora"]["losses"] == [1.0 + 1e-7]
    assert "another machine" in log.read_text()
    assert on("b", 1.0 + 1e-7) == both, "nothing changed"
    # Other numbers: of what the others made of them nothing is known.
    assert on("b", 2.0)["machine"] == {"cpu": "b"}
    assert "others" not in read_record(file)
    assert on("c", 3.0)["machine"] == {"cpu": "c"}


@pytest.mark.parametrize("reason", ["", " \n"])
def test_the_command_refuses_without_a_reason(reason: str) -> None:
    before = FILE.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "checks" / "reference.py")],
        env={**os.environ, "REASON": reason}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == 'error: say why the losses change: make reference REASON="..."\n'
    assert FILE.stat().st_mtime_ns == before
