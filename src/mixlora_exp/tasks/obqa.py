"""OpenBookQA: elementary science stems, to be answered or completed by one of four options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered


def _parse(row: Mapping[str, Any], index: int) -> Item:
    options, answer = row_fields.choices(row)
    return Item(
        task="obqa",
        id=row_fields.row_id(row, "obqa", index),
        question=row_fields.text(row, "question_stem"),
        options=options,
        answer=answer,
        labels=row_fields.letters(options),
    )


def _label_prompt(item: Item) -> Prompt:
    return Prompt(
        before=f"{item.question}\nPick what answers or completes this.\n",
        context=item.context,
        after=f"{lettered(item)}Answer:",
    )


def _text_prompt(item: Item) -> Prompt:
    return Prompt(f"Answer or complete: {item.question}\n", item.context, "Answer:")


OBQA = Task(
    name="obqa",
    title="OBQA",
    kind="Question Answering",
    hub_id="allenai/openbookqa",
    hub_config="main",
    revision="388097ea7776314e93a529163e0fea805b8a6454",
    splits={"train": "train", "test": "test"},
    sizes={"train": 4957, "test": 500},
    characters={"label": 181, "text": 103},
    parse=_parse,
    label_prompt=_label_prompt,
    text_prompt=_text_prompt,
)
