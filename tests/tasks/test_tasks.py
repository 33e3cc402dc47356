"""Each task reads official rows, refuses others with the reason, and asks in two forms."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from mixlora_exp.config.schema import TASK_NAMES, AnswerForm
from mixlora_exp.evaluation.harness_tasks import HARNESS_TASKS
from mixlora_exp.tasks import TASKS
from mixlora_exp.tasks.embedded.make import ASKED, MAKERS

LETTERED = {"text": ["rain", "a rock", "glass", "dust"], "label": ["A", "B", "C", "D"]}

ROWS: dict[str, dict[str, Any]] = {
    "arc_e": {"id": "q7", "question": "What is wet?", "choices": LETTERED, "answerKey": "A"},
    "arc_c": {"question": "What is hard?", "choices": LETTERED, "answerKey": "B"},
    "boolq": {"question": "is snow cold", "passage": "Snow is frozen water.", "answer": True},
    "obqa": {"question_stem": "A window is", "choices": LETTERED, "answerKey": "C"},
    "piqa": {"goal": "Dry a cup", "sol1": "Wet it again.", "sol2": "Take a towel.", "label": 1},
    "siqa": {
        "context": "Ann won.", "question": "How is Ann?",
        "answerA": "sad", "answerB": "asleep", "answerC": "glad", "label": "3",
    },
    "hellaswag": {
        "activity_label": "Tea", "ctx": "A man boils water. He",
        "endings": ["flies.", "sinks.", "makes tea.", "melts."], "label": "2",
    },
    "winogrande": {
        "sentence": "The cup broke the plate because the _ fell.",
        "option1": "plate", "option2": "cup", "answer": "2",
    },
}  # fmt: skip
RIGHT = {
    "arc_e": "rain", "arc_c": "a rock", "boolq": "true", "obqa": "glass", "piqa": "Take a towel.",
    "siqa": "glad", "hellaswag": "makes tea.", "winogrande": "cup",
}  # fmt: skip

BAD = [
    ("arc_e", {"choices": ...}, "field 'choices' is missing"),
    ("arc_e", {"answerKey": "F"}, "answerKey 'F' is not among the labels A, B, C, D"),
    ("arc_e", {"question": "  "}, "field 'question' is empty"),
    ("arc_e", {"question": 3}, "field 'question' must be text, not int"),
    ("arc_e", {"question": None}, "field 'question' is null"),
    ("arc_e", {"choices": ["a", "b"]}, "field 'choices' must be an object"),
    ("arc_e", {"choices": {"text": ["x"], "label": ["A"]}}, "at least 2"),
    ("arc_e", {"choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "repeats a label"),
    ("arc_c", {"choices": {"text": ["x", "y"], "label": ["A", "B", "C"]}}, "2 texts but 3 labels"),
    ("arc_c", {"choices": {"text": ["x", ""], "label": ["A", "B"]}}, "is empty"),
    ("arc_c", {"choices": {"text": "xy", "label": ["A", "B"]}}, "must be a list"),
    ("boolq", {"answer": "yes"}, "field 'answer' must be true or false"),
    ("boolq", {"answer": 1}, "field 'answer' must be true or false"),
    ("boolq", {"passage": ...}, "field 'passage' is missing"),
    ("obqa", {"question_stem": ...}, "field 'question_stem' is missing"),
    ("piqa", {"label": -1}, "label -1 is not one of 0..1"),
    ("piqa", {"label": True}, "label True is not one of 0..1"),
    ("piqa", {"sol2": ""}, "field 'sol2' is empty"),
    ("siqa", {"label": "0"}, "label '0' is not one of 1..3"),
    ("siqa", {"answerC": ...}, "field 'answerC' is missing"),
    ("hellaswag", {"label": 7}, "label 7 is not one of 0..3"),
    ("hellaswag", {"label": ""}, "label '' is not one of 0..3"),
    ("hellaswag", {"endings": ["one"]}, "at least 2"),
    ("winogrande", {"answer": ""}, "answer '' is not one of 1..2"),
    ("winogrande", {"sentence": "No gap."}, "no blank '_'"),
]

# What stands in the folder of benchmark data.
ROWS_AT_HAND = {
    "arc_e": (2251, 2376), "arc_c": (1119, 1172), "boolq": (9427, 3270), "obqa": (4957, 500),
    "piqa": (16113, 1838), "siqa": (33410, None), "hellaswag": (6477, 10042),
    "winogrande": (9248, None),
}  # fmt: skip


def parse(task: str, row: dict[str, Any] | None = None, index: int = 4):
    return TASKS[task].parse(ROWS[task] if row is None else row, index)


def test_tasks_are_known_by_their_names_everywhere() -> None:
    assert all(name == task.name for name, task in TASKS.items())
    assert list(HARNESS_TASKS) == list(TASKS)
    assert {*ASKED, *MAKERS} == set(TASKS)
    forms = {form.value for form in AnswerForm}
    assert all(set(task.characters) == forms for task in TASKS.values())


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_good_row_gives_the_right_option(task: str) -> None:
    item = parse(task)
    assert item.task == task
    assert item.options[item.answer] == RIGHT[task]
    assert item.labels == (
        ("true", "false") if task == "boolq" else tuple("ABCD"[: len(item.labels)])
    )
    assert item.id == ("q7" if task == "arc_e" else f"{task}-4")


@pytest.mark.parametrize(("task", "change", "reason"), BAD)
def test_a_bad_row_is_refused_with_the_reason(task: str, change: dict, reason: str) -> None:
    row = {**ROWS[task], **change}
    row = {name: value for name, value in row.items() if value is not ...}
    with pytest.raises(ValueError, match="^.*" + reason.replace(".", r"\.").replace("(", r"\(")):
        parse(task, row)


def test_numbered_arc_options_become_letters() -> None:
    row = {
        **ROWS["arc_e"],
        "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    }
    item = parse("arc_e", row)
    assert (item.labels, item.answer) == (("A", "B", "C"), 2)


def test_hellaswag_labels_may_be_numbers_and_the_activity_is_not_used() -> None:
    item = parse("hellaswag", {**ROWS["hellaswag"], "label": 1})
    assert item.answer == 1
    assert "Tea" not in TASKS["hellaswag"].label_prompt(item).text


@pytest.mark.parametrize("task", TASK_NAMES)
def test_prompts_hold_the_question_and_end_where_the_answer_follows(task: str) -> None:
    item = parse(task)
    for build in (TASKS[task].label_prompt, TASKS[task].text_prompt):
        prompt = build(item)
        assert item.question in prompt.text
        assert prompt.context == item.context
        assert prompt.text == prompt.text.rstrip()
    label = TASKS[task].label_prompt(item).text
    assert label.endswith("Answer:")
    if task == "boolq":
        assert "true" in label
        assert "false" in label
        return
    for letter, option in zip(item.labels, item.options, strict=True):
        assert f"{letter}. {option}\n" in label
        if task != "winogrande":
            assert option not in TASKS[task].text_prompt(item).text


def test_golden_prompts() -> None:
    assert TASKS["arc_e"].label_prompt(parse("arc_e")).text == (
        "Science quiz: What is wet?\nWhich of these is correct?\n"
        "A. rain\nB. a rock\nC. glass\nD. dust\nAnswer:"
    )
    assert TASKS["arc_e"].text_prompt(parse("arc_e")).text == "Science quiz: What is wet?\nAnswer:"
    assert TASKS["hellaswag"].text_prompt(parse("hellaswag")).text == "A man boils water. He"
    assert TASKS["siqa"].text_prompt(parse("siqa")).text == "Scene: Ann won.\nHow is Ann?\nAnswer:"


def test_boolq_reads_well_without_its_passage() -> None:
    from dataclasses import replace

    task, item = TASKS["boolq"], parse("boolq")
    text = task.label_prompt(item).text
    assert text.startswith("Passage: Snow is frozen water.\nQuestion: is snow")
    assert task.label_prompt(replace(item, context="")).text.startswith("Question: is snow cold?\n")


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_row_of_the_real_data_parses(task: str, shared_data) -> None:
    for split, expected in zip(("train", "test"), ROWS_AT_HAND[task], strict=True):
        file = shared_data / task / f"{split}.jsonl.gz"
        if expected is None:
            assert not file.exists()
            continue
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            items = [TASKS[task].parse(json.loads(row), i) for i, row in enumerate(stream)]
        assert len(items) == expected
        if (task, split) != ("hellaswag", "train"):  # a part of the official rows is at hand
            assert len(items) == TASKS[task].sizes[split]
        assert all(0 <= item.answer < len(item.options) for item in items)
