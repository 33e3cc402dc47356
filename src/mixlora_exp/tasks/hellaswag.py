"""HellaSwag: the beginning of a text and four continuations; prompts omit the activity label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered


def _clean(text: str) -> str:
    """Return the text without WikiHow's marks ("[header]", "[step]"): "[title]" becomes the end of
    a
    sentence, other marks and repeated spaces are removed.

    The same cleaning as in lm-eval, applied until nothing changes, so that it is idempotent. A text
    that consists only of marks is unchanged.
    """
    cleaned, before = text, None
    while cleaned != before:
        before = cleaned
        cleaned = (
            re.sub(r"\[.*?\]", "", cleaned.replace(" [title]", ". ")).replace("  ", " ").strip()
        )
    return cleaned or text


def _parse(row: Mapping[str, Any], index: int) -> Item:
    options = tuple(map(_clean, row_fields.texts(row, "endings")))
    return Item(
        task="hellaswag",
        id=row_fields.row_id(row, "hellaswag", index),
        question="",
        options=options,
        answer=row_fields.number(row, "label", 0, len(options) - 1),
        labels=row_fields.letters(options),
        context=_clean(row_fields.text(row, "ctx")),
    )


def _label_prompt(item: Item) -> Prompt:
    return Prompt(
        before="Opening: ",
        context=item.context,
        after=f"\nWhich continuation is the likeliest?\n{lettered(item)}Answer:",
    )


def _text_prompt(item: Item) -> Prompt:
    """Return the text itself, which the answer continues."""
    return Prompt("", item.context, "")


HELLASWAG = Task(
    name="hellaswag",
    title="HellaSwag",
    kind="Sentence Completion",
    hub_id="Rowan/hellaswag",
    hub_config=None,
    revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
    splits={"train": "train", "test": "validation"},
    sizes={"train": 39905, "test": 10042},
    # Over 6,477 rows of it.
    characters={"label": 465, "text": 190},
    parse=_parse,
    label_prompt=_label_prompt,
    text_prompt=_text_prompt,
)
