"""The commonsense suite of LLM-Adapters: rows {instruction, input, output, answer}, and the first
answer that a generated text names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from composed import compose

from mixlora_exp.config.command import compose as compose_anew
from mixlora_exp.config.resolve import fingerprint, fingerprint_of, to_dict
from mixlora_exp.config.schema import Config, Protocol
from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import free_text
from mixlora_exp.models.tiny import build_tokenizer
from mixlora_exp.records.record import read_run
from mixlora_exp.records.show import scores_table
from mixlora_exp.runs.run import run
from mixlora_exp.tasks.free_text import first_named

RIGHT = {
    "boolq": ("true/false", "true"), "piqa": ("solution1/solution2", "solution2"),
    "siqa": ("answer1/answer2/answer3", "answer3"),
    "hellaswag": ("ending1/ending2/ending3/ending4", "ending4"),
    "winogrande": ("option1/option2", "option1"),
    "arc_e": ("answer1/answer2/answer3/answer4", "answer1"),
    "arc_c": ("answer1/answer2/answer3/answer4/answer5", "answer5"),
    "obqa": ("answer1/answer2/answer3/answer4", "answer2"),
}  # fmt: skip


def row(name: str, **changed: Any) -> dict[str, Any]:
    choices, right = RIGHT[name]
    return {
        "instruction": f"Which one? Say {choices}.", "input": "",
        "output": f"It is {right}", "answer": right, **changed,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as LLM-Adapters has them: each one list of objects."""
    train = [row(name) for name in RIGHT]
    files = {"commonsense/train": train, **{f"cs_{n}/test": [row(n)] * 2 for n in RIGHT}}
    for name, rows in files.items():
        path = tmp_path / "data" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows, indent=1))
    return tmp_path / "data"


def config_of(folder: Path, *words: str) -> Config:
    return compose(
        [
            "experiment=commonsense_170k", "model=tiny", "method=lora", "trainer.max_steps=1",
            "trainer.precision=float32", "evaluation.max_new_tokens=4", f"data.path={folder}",
            f"output_dir={folder.parent / 'out'}", *words,
        ]
    )  # fmt: skip


def test_the_suite_is_trained_and_scored(folder: Path, capsys) -> None:
    record = read_run(run(config_of(folder)))
    assert [score["task"] for score in record["scores"]] == [f"cs_{name}" for name in RIGHT]
    for score, (choices, right) in zip(record["scores"], RIGHT.values(), strict=True):
        assert (score["protocol"], score["n"], score["majority_class"]) == ("answer_pattern", 2, 1)
        assert score["chance"] == pytest.approx(1 / (choices.count("/") + 1))
        # A model of random weights names no answer.
        assert (score["unparsed"], score["accuracy"]) == (2, 0)
        assert len(right) > 1
    assert record["data"]["commonsense/train"][0]["rows"] == len(RIGHT)
    told = capsys.readouterr()
    assert "answer_pattern cs_boolq: 0.0 % of 2 items, 100.0 % unparsed" in told.out + told.err
    shown = scores_table(record, "answer_pattern").figures
    (unparsed,) = (column.cells for column in shown if "parsed" in column.head)
    assert unparsed == ["2"] * 8 + ["16"]


def test_the_prompt_is_the_instruction(folder: Path) -> None:
    config = config_of(folder)
    split = load_split(config.data, "commonsense", "train", config.task.custom)
    tokenizer = build_tokenizer()
    (example, *_) = encode_examples(tokenizer, split.items, config.data)
    text = tokenizer.decode(example.input_ids, skip_special_tokens=True)
    assert text == "Which one? Say true/false. It is true"
    assert example.answer_length == len(tokenizer(" It is true", add_special_tokens=False)[
        "input_ids"]) + 1  # fmt: skip


def test_a_template_and_an_input_are_put_around_it(folder: Path) -> None:
    rows = [row("boolq", input=" A passage. ")]
    (folder / "cs_boolq" / "test.json").write_text(json.dumps(rows))
    config = config_of(folder)
    config.task.custom["cs_boolq"].template = "### Task: {question} ### Reply:"
    (item,) = load_split(config.data, "cs_boolq", "test", config.task.custom).items
    assert item.question == "### Task: Which one? Say true/false.\nA passage. ### Reply:"
    assert item.turns == (("user", "Which one? Say true/false.\nA passage."),)
    assert item.labels == ("true", "false")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("the correct answer is answer2", "answer2"),
        ("answer4 rather than answer1", "answer4"),
        ("Answer1", None),
        ("", None),
        ("falsehood", None),
    ],
)
def test_the_first_answer_that_a_text_names(text: str, named: str | None) -> None:
    assert first_named(text, [f"answer{n}" for n in range(1, 6)]) == named


def test_a_longer_label_goes_before_its_beginning() -> None:
    assert first_named("it is answer12", ["answer1", "answer12"]) == "answer12"


def test_another_answer_is_wrong_and_none_is_unparsed(folder: Path) -> None:
    config = config_of(folder)
    (item, _) = load_split(config.data, "cs_obqa", "test", config.task.custom).items
    texts = ["answer2, not answer1", "answer1 or answer2", "answer5", "the second"]
    found = [free_text._score(Protocol.answer_pattern, item, text).prediction for text in texts]
    assert found == [0, 1, 1, None]


def test_hira_has_the_settings_of_the_suite_too() -> None:
    hira, dora = (compose_anew([f"experiment=commonsense_170k{name}"]) for name in ("_hira", ""))
    for group in ("trainer", "data", "task", "evaluation", "model"):
        assert getattr(hira, group) == getattr(dora, group), group
    assert hira.method.name == "hira"
    assert hira.method.peft["r"] == dora.method.rank
    assert hira.method.peft["target_modules"] == dora.method.targets


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([row("boolq", answer="yes")], "row 1: .*answer 'yes' is not one of true, false"),
        ([row("boolq"), {"instruction": "a"}], "row 2: .*field 'output' is missing"),
        ([row("boolq", input=3)], "row 1: .*field 'input' must be text, not int"),
        ([row("boolq"), "text"], "row 2 is not a JSON object but a str"),
        ({"rows": []}, "is not a list of objects but a dict"),
        ([], "has no rows"),
    ],
)
def test_what_is_no_file_of_the_suite_is_reported(folder: Path, rows: Any, told: str) -> None:
    (folder / "cs_boolq" / "test.json").write_text(json.dumps(rows))
    config = config_of(folder)
    with pytest.raises(UserError, match=told):
        load_split(config.data, "cs_boolq", "test", config.task.custom)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluation.protocols=[exact_match]"], "is free text, which answer_pattern scores"),
        (["evaluation.protocols=[answer_pattern,generate]"], "which answer_pattern scores"),
        (["task.custom.cs_obqa.label=null"], "name two or more, and in task.custom.label"),
        (["task.custom.cs_obqa.labels=[a]"], "name two or more, and in task.custom.label"),
        (["task.custom.cs_obqa.template=Question"], "it must contain {question} once"),
        (
            ["task.evaluate=[cs_boolq,arc_e]"],
            "cs_boolq is free text, which answer_pattern scores",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_reported(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        compose_anew(["experiment=commonsense_170k", *words])


def test_labels_are_of_free_text_alone() -> None:
    custom = "{a:{question:q,options:[o],answer:k,answer_as:letter,label:k,labels:[x,y]}}"
    words = ["task.train=[a]", "task.evaluate=[a]", f"+task.custom={custom}", "data=local"]
    with pytest.raises(UserError, match="it belongs to free text"):
        compose_anew(["task=arc_e", *words])


def test_earlier_tasks_of_free_text_keep_their_fingerprint() -> None:
    config = compose(["experiment=metamath_gsm8k"])
    older = to_dict(config)
    for task in older["task"]["custom"].values():
        for name in ("template", "labels", "label"):
            del task[name]
    assert fingerprint_of(older) == fingerprint(config)
