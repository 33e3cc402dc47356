"""Differences in the tables: paired, with intervals, and only of what can be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from table_cells import SMALL, block, five, multi_task, row

from mixlora_exp.results.build import gather

Write = Callable[..., Path]


def test_methods_are_compared_on_the_same_items(add: Write, results: Path) -> None:
    for seed in (1, 2):
        add(f"lora{seed}", 0.4, "method=lora", f"seed={seed}", n=200)
        add(f"mix{seed}", 0.75, "method=mixlora", f"seed={seed}", n=200)
        add(f"dora{seed}", 0.41, "method=dora", f"seed={seed}", n=200)
    found = multi_task(results)
    better = row(found, "MixLoRA", "MT", "minus LoRA")["ARC-e"]
    assert (better.mark, better.value) == ("better", pytest.approx(35.0))
    assert better.p < better.q < 0.01, "corrected for the table's other comparisons"
    assert row(found, "DoRA", "MT", "minus LoRA")["ARC-e"].mark == ""
    assert row(found, "majority class", "-", "")["ARC-e"].value == pytest.approx(30.0)
    assert row(found, "chance", "-", "")["average"].value == pytest.approx(25.0)
    likelihood = row(found, "LoRA", "MT", "log-likelihood of the gold answer")
    assert likelihood["ARC-e"].value == pytest.approx(-1.25)


def test_one_seed_is_never_marked(add: Write, results: Path) -> None:
    add("lora", 0.3, "method=lora", n=200)
    add("mix", 0.9, "method=mixlora", n=200)
    found = row(multi_task(results), "MixLoRA", "MT", "minus LoRA")
    assert found["ARC-e"].value == pytest.approx(60.0)
    assert (found["ARC-e"].mark, found["ARC-e"].q, found["ARC-e"].seeds) == ("", None, 1)
    assert found["ARC-e"].p < 1e-6


def test_what_is_not_above_chance_is_grey_and_has_no_mark(add: Write, results: Path) -> None:
    """BoolQ: 62.3 % of the training rows are true, so that 0.45 and 0.6 say nothing."""
    for seed in (1, 2):
        add(f"lora{seed}", 0.35, "method=lora", f"seed={seed}", n=400)
        add(f"mix{seed}", 0.5, "method=mixlora", f"seed={seed}", n=400)
    found = multi_task(results)
    cells = row(found, "MixLoRA", "MT", "ours")
    assert (cells["BoolQ"].value, cells["BoolQ"].at_chance) == (pytest.approx(60.0), True)
    assert cells["BoolQ"].show().endswith("]°")
    assert not cells["ARC-e"].at_chance
    assert not row(found, "LoRA", "MT", "ours")["PIQA"].at_chance
    minus = row(found, "MixLoRA", "MT", "minus LoRA")
    assert (minus["BoolQ"].at_chance, minus["BoolQ"].mark, minus["BoolQ"].q) == (True, "", None)
    assert (minus["ARC-e"].at_chance, minus["ARC-e"].mark) == (False, "better")
    # An average over a task at chance is grey, too; the last one leaves the task out.
    assert (minus["average"].at_chance, minus["average"].mark) == (True, "")
    assert (minus["above chance"].at_chance, minus["above chance"].mark) == (False, "better")
    told = [cells[name].value for name in ("ARC-e", "ARC-c", "OBQA", "PIQA")]
    assert cells["above chance"].value == pytest.approx(mean(told))


def test_averages_are_of_the_cells_of_their_row(add: Write, write: Write, results: Path) -> None:
    """A task with one seed more keeps it in its cell and in the average."""
    add("s1", 0.4, "method=lora", "seed=1")
    add("s2", 0.5, "method=lora", "seed=2")
    words = [*SMALL, "method=lora", "seed=3"]
    write(results / "runs", "s3", words, {"arc_e": 0.9})
    cells = row(multi_task(results), "LoRA", "MT", "ours")
    shown = [cells[name].value for name in ("ARC-e", "ARC-c", "BoolQ", "OBQA", "PIQA")]
    assert shown[0] == pytest.approx(60.0)
    assert cells["average"].value == pytest.approx(mean(shown))
    assert (cells["ARC-e"].seeds, cells["average"].seeds) == (3, 2)


def test_differences_of_single_and_multi_task(add: Write, write: Write, results: Path) -> None:
    table = gather(results).tables[2]
    cells = row(block(table, "LLaMA-2 7B"), "LoRA", "MT minus ST", "paper, recomputed")
    assert cells["PIQA"].value == pytest.approx(72.4 - 82.1)
    printed = row(block(table, "LLaMA-2 7B"), "LoRA", "MT minus ST", "paper, printed")
    assert (printed["PIQA"].value, printed["PIQA"].mark) == (2.5, "†")
    assert (printed["ARC-e"].value, printed["ARC-e"].mark) == (-12.5, "")
    for seed in (1, 2):
        add(f"mt{seed}", 0.5, "method=lora", f"seed={seed}")
        for task, value in (("arc_e", 0.4), ("piqa", 0.9)):
            words = [f"task={task}", *SMALL[2:], "method=lora", f"seed={seed}"]
            write(results / "runs", f"{task}{seed}", [SMALL[0], *words], {task: value})
    found = multi_task(results)
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


def test_other_data_is_not_compared_whatever_the_method(add: Write, results: Path) -> None:
    add("lora", 0.4, "method=lora")
    add("mix", 0.8, "method=mixlora", data_hash="other")
    found = gather(results)
    assert not any(b.run for b in found.tables[2].blocks)
    reasons = {entry.name: entry.reason for entry in found.left_out}
    assert reasons.keys() == {"lora", "mix"}
    assert "lora, mix read different data under the same conditions" in reasons["mix"]


def test_other_training_data_is_not_compared(add: Write, results: Path) -> None:
    add("lora", 0.4, "method=lora")
    add("mix", 0.8, "method=mixlora", train_hash="other")
    assert not any(b.run for b in gather(results).tables[2].blocks)


def test_the_base_model_is_compared_with_every_seed(add: Write, results: Path) -> None:
    for seed in (1, 2):
        add(f"s{seed}", 0.8, "method=lora", f"seed={seed}")
    add("base", 0.2, "method=none")
    found = multi_task(results)
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
