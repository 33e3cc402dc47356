"""Differences in the tables: paired, with intervals, and only of what can be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from table_cells import SMALL, block, five, row

from mixlora_exp.results.build import gather

Write = Callable[..., Path]


def test_methods_are_compared_on_the_same_items(write: Write, results: Path) -> None:
    write(results / "runs", "lora", [*SMALL, "method=lora"], five(0.2), n=200)
    write(results / "runs", "mix", [*SMALL, "method=mixlora"], five(0.6), n=200)
    write(results / "runs", "dora", [*SMALL, "method=dora"], five(0.21), n=200)
    found = block(gather(results).tables[2], "SmolLM2")
    assert row(found, "MixLoRA", "MT", "minus LoRA")["ARC-e"].mark == "better"
    assert row(found, "DoRA", "MT", "minus LoRA")["ARC-e"].mark == ""
    assert row(found, "majority class", "-", "")["ARC-e"].value == pytest.approx(30.0)
    assert row(found, "chance", "-", "")["average"].value == pytest.approx(25.0)
    likelihood = row(found, "LoRA", "MT", "log-likelihood of the gold answer")
    assert likelihood["ARC-e"].value == pytest.approx(-1.25)


def test_differences_of_single_and_multi_task(write: Write, results: Path) -> None:
    table = gather(results).tables[2]
    cells = row(block(table, "LLaMA-2 7B"), "LoRA", "MT minus ST", "paper, recomputed")
    assert cells["PIQA"].value == pytest.approx(72.4 - 82.1)
    printed = row(block(table, "LLaMA-2 7B"), "LoRA", "MT minus ST", "paper, printed")
    assert (printed["PIQA"].value, printed["PIQA"].mark) == (2.5, "†")
    assert (printed["ARC-e"].value, printed["ARC-e"].mark) == (-12.5, "")
    write(results / "runs", "mt", [*SMALL, "method=lora"], five(0.5))
    for task, value in (("arc_e", 0.4), ("piqa", 0.9)):
        single = ["model=smollm2_135m", f"task={task}", *SMALL[2:], "method=lora"]
        write(results / "runs", task, single, {task: value})
    found = block(gather(results).tables[2], "SmolLM2")
    cells = row(found, "LoRA", "MT minus ST", "ours")
    assert cells["ARC-e"].value == pytest.approx(10.0)
    assert cells["PIQA"].value == pytest.approx(-20.0)
    assert cells["OBQA"].value is None
    # Paired, over the same items.
    assert cells["PIQA"].low < -20.0 < cells["PIQA"].high
    assert cells["PIQA"].mark == "worse"
    assert cells["average"].value is None, "not all of the single tasks were run"
    # The other methods stand there too, with dashes.
    assert row(found, "MixDoRA", "MT", "ours")["ARC-e"].value is None
    assert found.filled == {"ST": (2, 20), "MT": (5, 20)}


def test_other_data_is_not_compared_whatever_the_method(write: Write, results: Path) -> None:
    write(results / "runs", "lora", [*SMALL, "method=lora"], five(0.4))
    write(results / "runs", "mix", [*SMALL, "method=mixlora"], five(0.8), data_hash="other")
    found = gather(results)
    assert not any(b.run for b in found.tables[2].blocks)
    reasons = {entry.name: entry.reason for entry in found.left_out}
    assert reasons.keys() == {"lora", "mix"}
    assert "lora, mix read different data under the same conditions" in reasons["mix"]


def test_other_training_data_is_not_compared(write: Write, results: Path) -> None:
    write(results / "runs", "lora", [*SMALL, "method=lora"], five(0.4))
    write(results / "runs", "mix", [*SMALL, "method=mixlora"], five(0.8), train_hash="other")
    assert not any(b.run for b in gather(results).tables[2].blocks)


def test_the_base_model_is_compared_with_every_seed(write: Write, results: Path) -> None:
    for seed in (1, 2):
        write(results / "runs", f"s{seed}", [*SMALL, "method=lora", f"seed={seed}"], five(0.8))
    write(results / "runs", "base", [*SMALL, "method=none"], five(0.2))
    found = block(gather(results).tables[2], "SmolLM2")
    cells = row(found, "LoRA", "MT", "minus the base model")
    assert cells["ARC-e"].value == pytest.approx(60.0)
    assert (cells["ARC-e"].seeds, cells["ARC-e"].mark) == (2, "better")
    assert cells["average"].value == pytest.approx(60.0)
    assert cells["average"].items == 5 * 40


def test_a_difference_from_the_paper_needs_the_paper_s_protocol(
    write: Write, results: Path
) -> None:
    words = ["model=llama2_7b", "task=multi", "data=hub", "method=lora"]
    write(results / "runs", "text", words, five(0.4), protocol="answer_text")
    (found,) = (b for b in gather(results).tables[2].blocks if b.run)
    assert not any("minus paper" in line.label[-1] for line in found.rows)
