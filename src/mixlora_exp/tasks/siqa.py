"""SIQA: a question about what people in a short situation feel, want or do; three options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered


def _parse(row: Mapping[str, Any], index: int) -> Item:
    options = tuple(row_fields.text(row, name) for name in ("answerA", "answerB", "answerC"))
    return Item(
        task="siqa",
        id=row_fields.row_id(row, "siqa", index),
        question=row_fields.text(row, "question"),
        options=options,
        answer=row_fields.number(row, "label", 1, 3) - 1,
        labels=row_fields.letters(options),
        context=row_fields.text(row, "context"),
    )


def _label_prompt(item: Item) -> Prompt:
    return Prompt(
        before="Scene: ",
        context=item.context,
        after=f"\n{item.question}\nWhich reply suits best?\n{lettered(item)}Answer:",
    )


def _text_prompt(item: Item) -> Prompt:
    return Prompt("Scene: ", item.context, f"\n{item.question}\nAnswer:")


SIQA = Task(
    name="siqa",
    title="SIQA",
    kind="Question Answering",
    hub_id="lighteval/siqa",
    hub_config=None,
    revision="54c6a1f8cb6daf4f5abf24a601852612fb35eb25",
    splits={"train": "train", "test": "validation"},
    sizes={"train": 33410, "test": 1954},
    characters={"label": 218, "text": 144},
    parse=_parse,
    label_prompt=_label_prompt,
    text_prompt=_text_prompt,
)
