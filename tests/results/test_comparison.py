"""Finished runs side by side: what is one side, what a difference says, and what is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.cli.main import main
from mixlora_exp.errors import UserError
from mixlora_exp.results.comparison import compare_runs, read_given

Write = Callable[..., Path]
WORDS = ("model=smollm2_135m", "task=arc_e", "data=embedded")


def words(method: str, seed: int, *more: str) -> list[str]:
    return [*WORDS, f"method={method}", f"seed={seed}", *more]


@pytest.fixture
def six(tmp_path: Path, write: Write) -> list[str]:
    """Three seeds of LoRA, and of MixLoRA, which is far better; more than one item in three differ
    between seeds."""
    places = []
    for method, share in (("lora", 0.45), ("mixlora", 0.75)):
        for seed in (1, 2, 3):
            folder = write(
                tmp_path, f"{method}{seed}", words(method, seed), {"arc_e": share}, n=400
            )
            places.append(str(folder))
    return places


def test_seeds_are_one_side_and_differences_are_paired(six: list[str]) -> None:
    compared = compare_runs(read_given(six))
    assert [(side.letter, side.seeds) for side in compared.sides] == [
        ("A", [1, 2, 3]),
        ("B", [1, 2, 3]),
    ]
    (one,) = compared.measured
    assert [round(score.estimate.value, 3) for score in one.scores] == [0.45, 0.75]
    (versus,) = one.differences
    assert versus.comparison is not None
    assert versus.comparison.value == pytest.approx(0.3)
    assert versus.comparison.low < 0.3 < versus.comparison.high
    assert (versus.comparison.seeds, versus.comparison.items) == (3, 400)
    assert versus.verdict == "better"
    assert versus.q == versus.comparison.p, "one comparison: nothing to correct"


def test_seeds_that_were_scored_again_are_one_side(tmp_path: Path, write: Write) -> None:
    """Each of them has another adapter, which its training explains."""

    def rescored(record: dict[str, Any]) -> None:
        kept = ("name", "fingerprint", "config", "data", "model", "kernel", "dtype")
        trained_by = {**{name: record[name] for name in kept}, "git": None}
        hashed = f"{record['config']['seed']}" * 64
        record["adapter"] = {"path": "x", "sha256": hashed, "trained_by": trained_by}

    places = [
        write(tmp_path, f"lora{seed}", words("lora", seed), {"arc_e": 0.5}, change=rescored)
        for seed in (1, 2)
    ]
    (side,) = compare_runs(read_given(map(str, places))).sides
    assert side.seeds == [1, 2]


def test_a_run_and_its_scoring_again_read_the_same_rows(tmp_path: Path, write: Write) -> None:
    """The rows of the training, which the later record has only under its adapter."""

    def rescored(record: dict[str, Any]) -> None:
        kept = ("name", "fingerprint", "config", "data", "model", "kernel", "dtype")
        trained_by = {**{name: record[name] for name in kept}, "git": None}
        record["data"] = {"arc_e/test": record["data"]["arc_e/test"]}
        record["adapter"] = {"path": "x", "sha256": "a" * 64, "trained_by": trained_by}

    found = {"arc_e": 0.5}
    places = [
        write(tmp_path, "run", words("lora", 1), found),
        write(tmp_path, "again", words("lora", 1, "evaluation.limit=7"), found, change=rescored),
        write(tmp_path, "other", words("dora", 1), found, train_hash="other"),
    ]
    names = compare_runs(read_given(map(str, places[:2]))).differing
    assert "evaluation.limit" in names
    assert not [name for name in names if name.startswith("rows of")]
    assert "rows of arc_e/train" in compare_runs(read_given(map(str, places[1:]))).differing


def test_seeds_that_are_left_out_are_told(tmp_path: Path, write: Write, capsys) -> None:
    for method, seeds in (("lora", (1,)), ("dora", (1, 2)), ("none", (1,))):
        for seed in seeds:
            write(tmp_path, f"{method}{seed}", words(method, seed), {"arc_e": 0.5})
    assert main(["compare", *(str(tmp_path / n) for n in ("lora1", "dora1", "dora2"))]) == 0
    assert "B - A: over seed 1 alone, which both have" in capsys.readouterr().out
    for names in (("lora1", "dora2"), ("none1", "dora1", "dora2")):
        assert main(["compare", *(str(tmp_path / name) for name in names)]) == 0
        assert "alone" not in capsys.readouterr().out


def test_sides_without_a_common_protocol_are_told(tmp_path: Path, write: Write, capsys) -> None:
    for name, protocol in (("lora", "label_logits"), ("dora", "answer_text")):
        write(tmp_path, name, words(name, 1), {"arc_e": 0.5}, protocol=protocol)
    assert main(["compare", str(tmp_path / "lora"), str(tmp_path / "dora")]) == 0
    out = capsys.readouterr().out
    assert "Paired differences" not in out
    assert "B - A: no difference, as all runs of both scored no task under one protocol" in out


def test_only_what_differs_is_listed(six: list[str]) -> None:
    names = compare_runs(read_given(six)).differing
    assert names["method.name"] == ("lora", "mixlora")
    assert names["method.alpha"] == (160.0, 32.0)
    assert not {"seed", "model.name", "trainer.learning_rate", "method.dropout"} & names.keys()


def test_one_seed_and_chance_are_never_called_better(tmp_path: Path, write: Write) -> None:
    for name, seed, share in (("a", 1, 0.1), ("b", 2, 0.25), ("c", 1, 0.9)):
        method = "lora" if name == "a" else "dora" if name == "b" else "mixlora"
        write(tmp_path, name, words(method, seed), {"arc_e": share}, n=200)
    compared = compare_runs(read_given(str(tmp_path / name) for name in "abc"))
    b, c = compared.measured[0].differences
    assert b.comparison is not None, "of two seeds, but one run each: the items are paired"
    assert (b.verdict, c.verdict) == ("at chance", "one seed")


def test_other_items_and_other_data_are_distinguished(tmp_path: Path, write: Write) -> None:
    write(tmp_path, "a", words("lora", 1), {"arc_e": 0.5})
    write(tmp_path, "b", words("dora", 1), {"arc_e": 0.5}, n=30)
    write(tmp_path, "c", words("mixlora", 1), {"arc_e": 0.5}, data_hash="other")
    found = compare_runs(read_given(str(tmp_path / name) for name in "abc")).measured[0].differences
    assert [versus.verdict for versus in found] == [
        "scored on other items",
        "scored on other data",
    ]


def test_tasks_that_one_side_lacks_are_a_dash(tmp_path: Path, write: Write, capsys) -> None:
    write(tmp_path, "a", words("lora", 1), {"arc_e": 0.5, "boolq": 0.6})
    write(tmp_path, "b", words("dora", 1), {"arc_e": 0.5})
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    cells = [line.split("│")[-2].strip() for line in out.splitlines() if "│ boolq, " in line]
    assert cells[0].startswith("60.0 [")
    assert cells[1] == "-"
    assert "arc_e, label_logits" in out.partition("Paired differences")[2]


def test_the_command_writes_data_and_a_plot(six: list[str], tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "out"
    assert main(["compare", *six, f"output={folder}"]) == 0
    out = capsys.readouterr().out
    assert "A  smollm2_135m LoRA trained on arc_e, 3 runs, seeds 1, 2, 3" in out
    assert "+30.0 [" in out
    assert "better" in out
    assert {path.name for path in folder.iterdir()} == {
        f"comparison.{kind}" for kind in ("csv", "png", "svg")
    }
    lines = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [line["side"] for line in lines] == ["A", "B"]
    assert float(lines[1]["delta"]) == pytest.approx(0.3)


def test_what_cannot_be_compared_is_one_line(six: list[str], tmp_path: Path, capsys) -> None:
    for given, message in (
        (six[:1], "compare needs two runs or more"),
        ([six[0], six[0]], "is given twice"),
        ([six[0], "nothing"], "nothing is not a run"),
    ):
        assert main(["compare", *given]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert message in told
        assert told.count("\n") == 1


def test_the_same_cell_twice_is_refused(tmp_path: Path, write: Write) -> None:
    for name, share in (("a", 0.5), ("b", 0.6)):
        write(tmp_path, name, words("lora", 1), {"arc_e": share})
    with pytest.raises(UserError, match="same settings and seed"):
        compare_runs(read_given([str(tmp_path / "a"), str(tmp_path / "b")]))
