"""BoolQ: a yes-or-no question about a passage, answered by true or false."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item, Prompt, Task

ANSWERS = ("true", "false")


def _parse(row: Mapping[str, Any], index: int) -> Item:
    answer = row_fields.value(row, "answer")
    if not isinstance(answer, bool):
        raise ValueError(f"field 'answer' must be true or false, not {answer!r}")
    return Item(
        task="boolq",
        id=row_fields.row_id(row, "boolq", index),
        question=row_fields.text(row, "question"),
        options=ANSWERS,
        answer=0 if answer else 1,
        labels=ANSWERS,
        context=row_fields.text(row, "passage"),
    )


def _prompt(item: Item) -> Prompt:
    """Return the prompt of both forms, since the options are the labels; without a passage, only
    the question."""
    question = item.question if item.question.endswith("?") else f"{item.question}?"
    question = f"Question: {question}\nSay true if the answer is yes, false if it is no.\nAnswer:"
    if not item.context:
        return Prompt("", "", question)
    return Prompt("Passage: ", item.context, f"\n{question}")


BOOLQ = Task(
    name="boolq",
    title="BoolQ",
    kind="Text Classification",
    hub_id="google/boolq",
    hub_config=None,
    revision="35b264d03638db9f4ce671b711558bf7ff0f80d5",
    splits={"train": "train", "test": "validation"},
    sizes={"train": 9427, "test": 3270},
    characters={"label": 694, "text": 694},
    parse=_parse,
    label_prompt=_prompt,
    text_prompt=_prompt,
)
