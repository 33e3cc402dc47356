"""A user's own task: the guide followed to the letter, and what is wrong with a row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.config.command import compose
from mixlora_exp.errors import UserError
from mixlora_exp.system.exit_codes import MISTAKE
from mixlora_exp.tasks import custom_task
from mixlora_exp.tasks.custom import label_prompt, text_prompt

GUIDE = Path(__file__).parents[2] / "docs" / "extending" / "task.md"
FIELDS: dict[str, Any] = {
    "question": "stem", "options": ["choices"], "answer": "key", "answer_as": "letter",
    "count_from": 0, "context": None,
}  # fmt: skip
ROW = {"stem": "Which melts?", "choices": ["a stone", "ice", "sand"], "key": "B"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def quiz(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of the guide: its YAML, and rows like its example."""
    (example,) = (json.loads(text) for text in blocks("json"))
    folder = tmp_path / "quizzes" / "kitchen"
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("test", 8)):
        rows = [
            {**example, "stem": f"{example['stem']} ({split} {i})", "key": "ABC"[i % 3]}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (yaml,) = blocks("yaml")
    name = yaml.splitlines()[0].removeprefix("# ")
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(yaml)
    return path.parents[1], tmp_path / "quizzes"


def test_the_guide_leads_to_a_scored_adapter(quiz: tuple[Path, Path], tmp_path: Path) -> None:
    conf, data = quiz
    commands = [line for text in blocks("bash") for line in text.splitlines() if "train.py" in line]
    assert len(commands) == 2
    for command in commands:
        words = command.replace("my_conf", str(conf)).replace("quizzes", str(data)).split()[2:]
        extra = ["model=tiny", "trainer.max_steps=2", "trainer.micro_batch_size=4",
                 "evaluation.protocols=[label_logits,answer_text,generate]",
                 f"output_dir={tmp_path / 'out'}"]  # fmt: skip
        assert execute([*words, *extra]) == 0
    (path,) = (tmp_path / "out").glob("*/record.json")
    record = json.loads(path.read_text())
    assert [(s["task"], s["protocol"], s["n"]) for s in record["scores"]] == [
        ("kitchen", protocol, 8) for protocol in ("label_logits", "answer_text", "generate")
    ]
    assert record["scores"][0]["chance"] == pytest.approx(1 / 3)
    assert record["train"]["examples"] == 24
    assert set(record["data"]) == {"kitchen/train", "kitchen/test"}


def test_prompts() -> None:
    item = custom_task("quiz", **FIELDS).parse(ROW, 0)
    assert (item.id, item.answer, item.labels) == ("quiz-0", 1, ("A", "B", "C"))
    assert label_prompt(item).text == "Question: Which melts?\nA. a stone\nB. ice\nC. sand\nAnswer:"
    fields = {**FIELDS, "context": "story"}
    item = custom_task("quiz", **fields).parse({**ROW, "story": "It is warm."}, 0)
    assert text_prompt(item).text == "Text: It is warm.\nQuestion: Which melts?\nAnswer:"


@pytest.mark.parametrize(
    ("fields", "key", "answer"),
    [
        ({}, "b", 1),
        ({}, "(C)", 2),
        ({"answer_as": "index"}, 2, 2),
        ({"answer_as": "index", "count_from": 1}, "3", 2),
        ({"answer_as": "text"}, "ice", 1),
    ],
)
def test_kinds_of_answers(fields: dict[str, Any], key: Any, answer: int) -> None:
    task = custom_task("quiz", **{**FIELDS, **fields})
    assert task.parse({**ROW, "key": key}, 0).answer == answer


def test_options_in_fields_of_their_own() -> None:
    task = custom_task("quiz", **{**FIELDS, "options": ["first", "second"]})
    item = task.parse({"stem": "Q?", "first": "x", "second": "y", "key": "B"}, 0)
    assert item.options == ("x", "y")


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({}, {"key": "D"}, "'D' is not one of A, B, C"),
        ({}, {"stem": None}, "'stem' is null"),
        ({"answer_as": "index"}, {"key": 3}, "3 is not one of 0..2"),
        ({"answer_as": "text"}, {"key": "fog"}, "'fog' is the text of 0"),
        ({"answer_as": "text"}, {"choices": ["ice", "ice"], "key": "ice"}, "the text of 2"),
        ({"context": "story"}, {}, "'story' is missing"),
    ],
)
def test_a_row_that_does_not_fit(
    fields: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        custom_task("quiz", **{**FIELDS, **fields}).parse({**ROW, **change}, 0)


OWN = "++task.custom={quiz:{question:q,options:[o],answer:a,answer_as:letter}}"


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(UserError, match="quiz is a custom task: add data=local"):
        compose([OWN, "task.train=[quiz]"])
    with pytest.raises(UserError, match=r"task\.train=quizz is not valid: choose from .*quiz"):
        compose([OWN, "task.train=[quizz]"])
    with pytest.raises(UserError, match=r"task\.custom=arc_e is not valid"):
        compose([OWN.replace("quiz:", "arc_e:")])


@pytest.mark.parametrize(
    "words",
    [
        "+task.custom.quiz={question:q}",
        "++task.custom.quiz.question=q",
        "task.custom.quiz={question:q}",
        "task.custom.quiz.question=q",
    ],
)
def test_a_task_that_is_added_in_part_names_the_words_that_add_it(words: str) -> None:
    added = "+task.custom={quiz:{question:q,options:[o],answer:a,answer_as:letter}}"
    with pytest.raises(UserError) as caught:
        compose([words])
    assert words.lstrip("+") in str(caught.value)
    assert str(caught.value).endswith(f"'{added}'")
    assert list(compose([added]).task.custom) == ["quiz"]


def test_a_bad_row_ends_the_run_with_its_line(
    quiz: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    conf, data = quiz
    path = data / "kitchen" / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = lines[4].replace('"stem"', '"steam"')
    path.write_text("\n".join(lines))
    words = [f"--config-dir={conf}", "task=kitchen", "data=local", f"data.path={data}"]
    assert execute([*words, "model=tiny", "dry_run=true"]) == MISTAKE
    assert "row of kitchen: field 'stem' is missing; the row has steam" in (capfd.readouterr().err)
