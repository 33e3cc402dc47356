"""Rows that are trained on and scored: told as the run begins."""

from __future__ import annotations

import json
from pathlib import Path

from composed import compose

from mixlora_exp.cli.train import execute
from mixlora_exp.runs.announce import coinciding
from mixlora_exp.runs.inputs import gather_inputs, scored_tests

LIMITS = ["experiment=smoke", "evaluation.limit=null", "evaluation.batch_check=0"]


def written(folder: Path, split: str, numbers: range, *, turned: bool = False) -> None:
    """Rows of BoolQ and ARC-e; `turned`: with the options in another order."""
    place = folder / "arc_e"
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in numbers:
        texts = [f"{i}", f"{i + 1}", "none", "all"]
        texts = texts[::-1] if turned else texts
        choices = {"text": texts, "label": ["A", "B", "C", "D"]}
        key = choices["label"][texts.index(f"{i + 1}")]
        question = f"What follows {i}?"
        rows.append({"id": f"{split}{i}", "question": question, "choices": choices,
                     "answerKey": key})  # fmt: skip
    (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def warnings(folder: Path, *words: str) -> list[str]:
    given = ["data=local", f"data.path={folder}", "task=arc_e", *words]
    config = compose([*LIMITS, *given])
    inputs = gather_inputs(config)
    return list(coinciding(config, inputs, scored_tests(config, inputs)))


def test_rows_that_coincide_are_counted_whatever_their_options_order(tmp_path: Path) -> None:
    written(tmp_path, "train", range(20))
    written(tmp_path, "test", range(15, 30), turned=True)
    (line,) = warnings(tmp_path)
    assert "5 of 15 items to score of arc_e are also training rows, the first test15" in line
    # Of the rows that are trained on: the first of a shuffle, not all.
    few = warnings(tmp_path, "data.train_limit=1")
    assert not few or "1 of 15" in few[0]
    assert warnings(tmp_path, "method=none") == []
    written(tmp_path, "test", range(20, 30))
    assert warnings(tmp_path) == []


def test_rows_held_out_of_training_do_not_coincide(tmp_path: Path) -> None:
    written(tmp_path, "train", range(20))
    written(tmp_path, "test", range(20))
    held = ["evaluation.held_out=true", "data.train_limit=10"]
    assert warnings(tmp_path, *held) == []


def test_a_run_prints_it(tmp_path: Path, capsys) -> None:
    written(tmp_path, "train", range(8))
    written(tmp_path, "test", range(4))
    argv = [*LIMITS, "data=local", f"data.path={tmp_path}", "trainer.max_steps=1", "method=lora"]
    assert execute([*argv, f"output_dir={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "warning: 4 of 4 items to score of arc_e are also training rows" in out
    assert "warning: too few items to tell settings apart: arc_e label_logits (4 items)" in out
    (folder,) = (tmp_path / "out").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "record.json", "predictions", "adapter", "train_log.jsonl"
    }  # fmt: skip
