"""Verdicts on the paper's figures: possible ones, telling ones, and reproduced ones by the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from table_cells import LLAMA, PAPER, five

from mixlora_exp.results.build import Results, gather
from mixlora_exp.results.self_checks import Checked, self_checks
from mixlora_exp.results.tables.parts import Entry, Row
from mixlora_exp.results.verdicts import Verdict, judged, possible, verdicts, verdicts_markdown


@pytest.fixture(scope="module")
def found(committed: Results) -> list[Verdict]:
    return list(verdicts(PAPER, committed.tables))


@pytest.fixture(scope="module")
def checked(committed: Results) -> list[Checked]:
    return list(self_checks(PAPER, committed.tables))


def test_accuracies_of_five_hundred_answers_are_even_tenths() -> None:
    assert [possible(80.0 + k / 10, 500) for k in range(11)] == [k % 2 == 0 for k in range(11)]
    assert all(possible(k / 10, 1172) for k in range(1001))


def test_figures_that_cannot_be_are_named(found: list[Verdict]) -> None:
    cannot = {
        (entry.table, entry.column, entry.printed)
        for entry in found
        if any(fault.startswith("no number of") for fault in entry.faults)
    }
    assert {printed for _, _, printed in cannot} == {80.9, 86.9, 84.5}
    assert {column for _, column, _ in cannot} == {"OBQA"}
    # MixDoRA's 80.9 stands in four tables.
    assert {number for number, _, printed in cannot if printed == 80.9} == {1, 2, 8, 9}


def test_figures_that_say_nothing_are_named(found: list[Verdict]) -> None:
    at_chance = {
        (entry.table, entry.line, entry.column)
        for entry in found
        if any(fault.startswith("not above chance") for fault in entry.faults)
    }
    assert (1, "Gemma 2B, DoRA, ST", "BoolQ") in at_chance
    assert (1, "LLaMA-2 7B, LoRA, ST", "BoolQ") in at_chance
    assert (1, "Gemma 2B, LoRA, ST", "WinoGrande") in at_chance
    assert (1, "LLaMA-2 7B, MixLoRA, ST", "BoolQ") not in at_chance


def test_figures_of_a_constant_answer_are_named(found: list[Verdict]) -> None:
    constant = {
        (entry.table, entry.line)
        for entry in found
        if any("is the majority class of the validation split" in fault for fault in entry.faults)
    }
    assert constant == {
        (table, f"{model}, {method}, ST")
        for model, method, tables in (("LLaMA-2 7B", "LoRA", (1, 2)), ("Gemma 2B", "DoRA", (1, 5)))
        for table in tables
    }


def test_every_printed_cell_has_a_verdict(found: list[Verdict], checked: list[Checked]) -> None:
    # 16 lines of 8 tasks, 8 and 8 of 5, 10 and 8 of 4, and their averages.
    assert len(found) == 16 * 9 + 16 * 6 + 18 * 5
    assert {entry.verdict for entry in found} == {"not run"}
    text = verdicts_markdown(found, checked)
    assert f"{len(found)} printed accuracies and averages: 0 reproduced" in text
    assert "no number of 500 answers gives 86.9" in text
    assert text.count("not run") == 1, "one line, not a page of dashes"
    assert (
        "Rows run: Gemma 2B 0 of 12, LLaMA-2 7B 0 of 30, LLaMA-3 8B 0 of 4, LLaMA-2 13B 0 of 4."
        in text
    )


@pytest.mark.parametrize(
    ("low", "high", "seeds", "verdict"),
    [(-1.5, 1.9, 3, "reproduced"), (2.1, 3.0, 3, "not reproduced"),
     (-9.0, -2.5, 5, "not reproduced"), (-1.0, 2.5, 3, "undecidable"),
     (0.0, 0.1, 1, "undecidable")],
)  # fmt: skip
def test_the_rule(low: float, high: float, seeds: int, verdict: str) -> None:
    middle = (low + high) / 2
    assert judged(Entry("difference", middle, low=low, high=high, seeds=seeds)) == verdict
    assert judged(None) == "not run"


def test_runs_are_judged(write: Callable[..., Path], results: Path) -> None:
    for seed in (1, 2, 3):
        words = [*LLAMA, "method=mixlora", f"seed={seed}"]
        write(results / "runs", f"s{seed}", words, five(0.3), n=400)
    made = list(verdicts(PAPER, gather(results).tables))
    (entry,) = [v for v in made if (v.table, v.column) == (2, "ARC-e") and "MixLoRA, MT" in v.line]
    assert (entry.verdict, entry.ours.value) == ("not reproduced", pytest.approx(30.0))
    text = verdicts_markdown(made, [])
    assert f"| 2 | {entry.line} | ARC-e | 76.6 | 30.0" in text
    assert "LLaMA-2 7B 1 of 30" in text


def test_figures_that_are_no_accuracies_are_held_against_the_paper(checked: list[Checked]) -> None:
    """24 differences, 5 percentages of 6 lines in two tables, and #Params of 42 lines."""
    assert len(checked) == 24 + 2 * 30 + 42
    wrong = {(c.table, c.line, c.column, c.printed, c.fault) for c in checked if c.fault}
    llama = "LLaMA-2 7B, {}, MT minus ST"
    assert wrong == {
        (2, llama.format("LoRA"), "PIQA", "2.5", "the two rows give -9.7"),
        (2, llama.format("LoRA"), "average", "-1.9", "the two rows give -4.4"),
        (2, llama.format("DoRA"), "OBQA", "-2.8", "the two rows give -4.8"),
        (2, llama.format("DoRA"), "PIQA", "-6.9", "the two rows give -10.8"),
        (2, llama.format("DoRA"), "average", "-6.7", "the two rows give -8.0"),
        (7, "MixLoRA not optimized, adapters: 2", "infer forward", "160.6",
         "243.1 of 152 is 159.9"),
    }  # fmt: skip


def test_printed_parameters_are_compared_with_the_shapes(
    committed: Results, checked: list[Checked]
) -> None:
    """A figure that is off by more than its rounding is named."""
    own = [c for c in checked if c.column == "#Params (%)"]
    assert not any(c.fault for c in own)
    table = committed.tables[8]
    block = table.blocks[0]
    rows = [
        Row(row.label, (dataclasses.replace(row.cells[0], value=2.93), *row.cells[1:]))
        if row.label == ("MixLoRA r=16", "ST", "paper") else row
        for row in block.rows
    ]  # fmt: skip
    changed = dataclasses.replace(
        table, blocks=[dataclasses.replace(block, rows=tuple(rows)), *table.blocks[1:]]
    )
    (found,) = [
        c for c in self_checks(PAPER, {**committed.tables, 8: changed}) if "shapes" in c.fault
    ]
    assert (found.table, found.printed) == (8, "2.93")
    assert found.fault.startswith("the shapes give 2.9")
