"""PIQA: a practical goal and two ways to reach it, of which one works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered


def _parse(row: Mapping[str, Any], index: int) -> Item:
    options = (row_fields.text(row, "sol1"), row_fields.text(row, "sol2"))
    return Item(
        task="piqa",
        id=row_fields.row_id(row, "piqa", index),
        question=row_fields.text(row, "goal"),
        options=options,
        answer=row_fields.number(row, "label", 0, 1),
        labels=row_fields.letters(options),
    )


def _label_prompt(item: Item) -> Prompt:
    return Prompt(
        before=f"Goal: {item.question}\nWhich way gets this done?\n",
        context=item.context,
        after=f"{lettered(item)}Answer:",
    )


def _text_prompt(item: Item) -> Prompt:
    return Prompt(f"Goal: {item.question}\nHow is this done?\n", item.context, "Answer:")


PIQA = Task(
    name="piqa",
    title="PIQA",
    kind="Question Answering",
    hub_id="baber/piqa",
    hub_config=None,
    revision="142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    splits={"train": "train", "test": "validation"},
    sizes={"train": 16113, "test": 1838},
    characters={"label": 284, "text": 168},
    parse=_parse,
    label_prompt=_label_prompt,
    text_prompt=_text_prompt,
)
