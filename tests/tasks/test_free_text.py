"""Rows of free text, and the number that a solution ends with."""

from __future__ import annotations

import time

import pytest

from mixlora_exp.tasks import custom_task
from mixlora_exp.tasks.free_text import final_number

COMMON = {"options": [], "count_from": 0, "context": None}
CHAT = custom_task("t", question="m", answer="m", answer_as="messages", **COMMON)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Half of 48 is <<48/2=24>>24.\n#### 72", "72"),
        ("She has 3 left.\n#### 1,234,567", "1234567"),
        ("The answer is: 18", "18"),
        ("The answer is $18.50 for 2 tickets", "18.5"),
        ("so the Answer is -3.00.", "-3"),
        ("#### -0", "0"),
        ("First the answer is 4, but then the answer is 5 of 7", "5"),
        ("That makes 3 + 4 = 7 apples.", "7"),
        ("10-3", "3"),
        ("It costs .5 dollars", "0.5"),
        ("she has 10 - 3", "3"),
        ("The answer is 2 + 3 = 5", "5"),
        ("The answer is 12 / 4 = 3 boxes.", "3"),
        ("The answer is 3 x 4 - 2 = 10.", "10"),
        ("The answer is 2 + 3", "2"),
        ("10\u00a0000", "10000"),
        ("the total is 1,00,000", "100000"),
        ("\u22125", "-5"),
        ("it is -$5", "-5"),
        ("1{,}200", "1200"),
        ("3,4,5", "5"),
        ("10,20,30", "30"),
        ("COVID-19", "19"),
        ("#### 42\nThat is the answer is clear", "42"),
        (r"The answer is: \frac{1}{2}", "0.5"),
        (r"The answer is: -\frac{7}{2}.", "-3.5"),
        ("The answer is 3/4 of it", "0.75"),
        ("The answer is 3/0", None),
        ("3/4", "4"),
        ("The answer is 2/4 = 1/2", "0.5"),
        ("The answer is 50/100=1/2.", "0.5"),
        (r"The answer is \frac12", "0.5"),
        (r"The answer is \dfrac{ 1 }{ 2 }", "0.5"),
        (r"The answer is \frac{3}{4} + \frac{1}{4} = 1", "1"),
        ("The answer is 3 1/2 cups", "3.5"),
        (r"The answer is 10\frac{1}{2}", "10.5"),
        ("The answer is -3 1/2", "-3.5"),
        ("The answer is 12/25/2024", "12"),
        ("The answer is 1/2.5", "0.4"),
        ("1/2####5", "5"),
        ("9" * 40, "9" * 9),
        ("100", "100"),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    found = final_number(text)
    assert (None if found is None else f"{found:f}") == number


def test_a_prompt_and_its_completion() -> None:
    task = custom_task(
        "t", question="query", answer="response", answer_as="completion",
        instruction="Think step by step.", **COMMON,
    )  # fmt: skip
    item = task.read({"query": "How many?", "response": "The answer is: 1,000"}, 4)
    assert item.turns == (("user", "How many? Think step by step."),)
    assert item.options == ("The answer is: 1,000",)
    assert item.labels == ("1000",)
    with pytest.raises(ValueError, match="field 'response' is missing"):
        task.read({"query": "How many?"}, 0)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_the_last_message_of_the_assistant_is_the_completion() -> None:
    rows = [
        message("system", "Be brief."),
        message("user", "a"),
        message("assistant", "b"),
        message("user", "c"),
        message("assistant", "7"),
    ]
    for more in ([], [message("user", "not answered")]):
        item = CHAT.read({"m": [*rows, *more]}, 0)
        assert item.turns[0] == ("system", "Be brief.")
        assert item.turns[-1] == ("user", "c")
        assert (item.options, item.labels) == (("7",), ("7",))


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("text", "must be a list of messages, not str"),
        (["text"], r"field 'm\[0\]' must be an object with role and content"),
        ([{"content": "a"}], r"field 'm\[0\]' has role None, which is none of system, user"),
        ([message("human", "a")], "has role 'human'"),
        ([message("user", " ")], "has no content"),
        ([{"role": "user", "content": ["a"]}], "has no content"),
        ([message("user", "a")], "no message of the assistant after one of the user"),
        ([message("assistant", "a")], "no message of the assistant after one of the user"),
        ([], "no message of the assistant after one of the user"),
    ],
)
def test_what_is_no_chat_is_reported(messages: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CHAT.read({"m": messages}, 0)


@pytest.mark.parametrize("piece", ["####", "the answer is ", "1,", "1 + ", "1/", "\\frac{1}{", "-"])
def test_a_long_text_takes_no_time(piece: str) -> None:
    start = time.perf_counter()
    final_number(piece * 50_000)
    assert time.perf_counter() - start < 5
