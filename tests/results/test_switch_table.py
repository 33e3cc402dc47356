"""The table of switches: runs that differ in switches alone, on the same items and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from composed import compose

from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.results.build import gather
from mixlora_exp.results.tables.parts import Block, Entry

Write = Callable[..., Path]
WORDS = [
    "model=smollm2_135m", "data=local", "data.path=x", "method=mixdora", "data.train_limit=8",
    "evaluation.limit=40", "task=multi", "task.name=pair", "task.train=[arc_e,boolq]",
    "task.evaluate=[arc_e,boolq]",
]  # fmt: skip


def likelihoods(folder: Path, shift: float) -> None:
    """Give each item a log-likelihood, the same in every run but for `shift`."""
    for path in (folder / "predictions").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["gold_log_likelihood"] = -1.0 - 0.01 * i + shift
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cell(block: Block, label: str, row: str, column: str = "ARC-e") -> Entry:
    found = {r.label: r for r in block.rows}[label, row]
    return found.cells[block.columns.index(column)]


def test_switches_are_those_of_the_presets() -> None:
    plain, official = (
        to_dict(compose(["method=mixdora", f"preset={name}"])) for name in ("correct", "official")
    )
    moved = {
        f"{group}.{name}"
        for group in ("trainer", "method", "data", "evaluation")
        for name, value in plain[group].items()
        if official[group][name] != value
    }
    assert moved <= set(SWITCHES.values())
    assert set(SWITCHES.values()) - moved == {"method.router_loss_coef"}


def test_each_switch_beside_none(write: Write, results: Path) -> None:
    share = {"arc_e": 0.5, "boolq": 0.5}
    for seed in (1, 2, 3):
        for preset, value, shift in (
            ("correct", share, 0.0),
            ("official", {"arc_e": 0.2, "boolq": 0.5}, -0.5),
            ("only_loss_on", share, 0.0),
            ("only_padding_in_loss", share, 0.25 if seed == 1 else -0.25),
            ("only_router_loss_coef", share, 0.0),
        ):
            words = [*WORDS, f"preset={preset}", f"seed={seed}"]
            likelihoods(write(results / "runs", f"{preset}-{seed}", words, value), shift)
    (block,) = gather(results).tables[10].blocks
    assert "SmolLM2 135M, MixDoRA trained on ARC-e, BoolQ" in block.heading
    assert "data.train_limit=8" in block.heading
    labels = list(dict.fromkeys(row.label[0] for row in block.rows))
    assert labels[0] == "preset=correct"
    assert set(labels[1:-3]) == {
        "preset=official",
        "trainer.loss_on=all",
        "trainer.loss_on=all, trainer.padding_in_loss=true",
        # Not of the official code, but a preset of its own.
        "method.router_loss_coef=0.01",
    }
    assert labels[-3:] == ["majority class", "chance", "chance or majority"]
    effect = cell(block, "preset=official", "accuracy minus preset=correct")
    assert effect.value == pytest.approx(-30.0)
    assert effect.seeds == 3
    likelihood = "log-likelihood minus preset=correct"
    assert cell(block, "preset=official", likelihood).value == pytest.approx(-0.5)
    assert cell(block, "preset=official", likelihood).mark == "worse"
    same = cell(block, "trainer.loss_on=all", likelihood, "BoolQ")
    # Zero in every item: no interval of zero width, yet one of the corrected comparisons.
    assert (same.kind, same.show(), same.value, same.low) == ("versus", "equal", 0.0, None)
    assert (same.p, same.q) == (1.0, 1.0)
    assert len(same.records) == 6
    # One seed up, two down: no matter how sure each is, three seeds do not tell.
    mixed = cell(block, "trainer.loss_on=all, trainer.padding_in_loss=true", likelihood)
    assert mixed.value == pytest.approx(-0.25 / 3)
    assert mixed.mark == ""
    assert "correct-1" in effect.records
    assert "official-3" in effect.records


def test_several_switches_have_the_shortest_name(write: Write, results: Path) -> None:
    three = ["trainer.loss_on=all", "trainer.padding_in_loss=true", "trainer.order=fixed"]
    cases = {
        "none": [],
        "three": three,
        "all-but-one": ["preset=official", "trainer.order=bucketed"],
        # By hand, but the same as the preset without one.
        "by-hand": [*three, "method.train_magnitude=false", "method.router_loss=topk",
                    "method.router_loss_pooling=all", "data.boolq_passage=false",
                    "evaluation.arc_labels=nine"],
    }  # fmt: skip
    for name, words in cases.items():
        write(results / "runs", name, [*WORDS, *words], {"arc_e": 0.5, "boolq": 0.5})
    (block,) = gather(results).tables[10].blocks
    labels = list(dict.fromkeys(row.label[0] for row in block.rows))
    assert labels[0] == "preset=correct"
    assert set(labels[1:-3]) == {
        "trainer.loss_on=all, trainer.padding_in_loss=true, trainer.order=fixed",
        "preset=official, trainer.order=bucketed",
        "preset=official, evaluation.dropout=false",
    }


def test_other_conditions_are_not_compared(write: Write, results: Path) -> None:
    share = {"arc_e": 0.5, "boolq": 0.5}
    write(results / "runs", "a", [*WORDS], share)
    write(results / "runs", "b", [*WORDS, "preset=only_loss_on", "data.train_limit=9"], share)
    write(results / "runs", "c", [*WORDS, "preset=only_loss_on", "method.rank=8"], share)
    found = gather(results)
    assert found.tables[10].blocks == []
    assert {"a", "b", "c"} <= {entry.name for entry in found.left_out}


def test_a_switch_that_decides_nothing_is_no_other_run(write: Write, results: Path) -> None:
    """ARC's labels are no part of how whole answers are scored: such a run is the run without the
    switch once more, on another machine perhaps, and no better or worse than itself."""
    share = {"arc_e": 0.5, "boolq": 0.5}
    for protocol in ("answer_text", "label_logits"):
        for preset, shift in (("correct", 0.0), ("only_arc_labels", 0.25), ("only_order", 0.5)):
            words = [*WORDS, f"preset={preset}", "seed=1"]
            name = f"{preset}-{protocol}"
            likelihoods(write(results / "runs", name, words, share, protocol=protocol), shift)
    answers, labels = gather(results).tables[10].blocks
    assert "protocol answer_text" in answers.heading
    assert {row.label[0] for row in answers.rows} == {
        "preset=correct", "trainer.order=fixed", "majority class", "chance", "chance or majority",
    }  # fmt: skip
    correct = cell(answers, "preset=correct", "accuracy")
    assert (correct.seeds, correct.records) == (1, ("correct-answer_text",))
    # With labels they count, but for a task that has no other labels.
    likelihood = ("evaluation.arc_labels=nine", "log-likelihood minus preset=correct")
    assert cell(labels, *likelihood).value == pytest.approx(0.25)
    assert cell(labels, *likelihood, "BoolQ").kind == "dash"


def test_blocks_that_differ_do_not_have_one_heading(write: Write, results: Path) -> None:
    for rank in (8, 16):
        for preset in ("correct", "only_order"):
            words = [*WORDS, f"preset={preset}", f"method.rank={rank}"]
            write(results / "runs", f"{preset}-{rank}", words, {"arc_e": 0.5, "boolq": 0.5})
    first, second = (block.heading for block in gather(results).tables[10].blocks)
    assert first.endswith(", method.rank=16")
    assert second.endswith(", method.rank=8")
