"""WinoGrande (debiased): a sentence with a blank that one of two candidates fills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered


def _parse(row: Mapping[str, Any], index: int) -> Item:
    sentence = row_fields.text(row, "sentence")
    if "_" not in sentence:
        raise ValueError("field 'sentence' has no blank '_'")
    options = (row_fields.text(row, "option1"), row_fields.text(row, "option2"))
    return Item(
        task="winogrande",
        id=row_fields.row_id(row, "winogrande", index),
        question=sentence,
        options=options,
        answer=row_fields.number(row, "answer", 1, 2) - 1,
        labels=row_fields.letters(options),
    )


def _label_prompt(item: Item) -> Prompt:
    return Prompt(
        before=f"Sentence: {item.question}\nWhich one belongs in the blank _?\n",
        context=item.context,
        after=f"{lettered(item)}Answer:",
    )


def _text_prompt(item: Item) -> Prompt:
    return Prompt(
        f"Sentence: {item.question}\nWho or what is meant by the blank _?\n",
        item.context,
        "Answer:",
    )


WINOGRANDE = Task(
    name="winogrande",
    title="WinoGrande",
    kind="Fill in the Blank",
    hub_id="allenai/winogrande",
    hub_config="winogrande_debiased",
    revision="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    splits={"train": "train", "test": "validation"},
    sizes={"train": 9248, "test": 1267},
    characters={"label": 175, "text": 163},
    parse=_parse,
    label_prompt=_label_prompt,
    text_prompt=_text_prompt,
)
