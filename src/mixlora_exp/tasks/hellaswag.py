"""HellaSwag: the start of a text and four ways to go on; the text alone is asked, no label of
the activity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import rows
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered

__all__ = ["HELLASWAG"]


def _clean(text: str) -> str:
    """The text without the marks that the articles from WikiHow carry ("[header]", "[step]"): a
    title begins a sentence, other marks go, and so do the blanks that they leave.

    As lm-eval cleans it, until nothing changes, so that text that came cleaned stays as it is. A
    text of nothing but marks is kept.
    """
    cleaned, before = text, None
    while cleaned != before:
        before = cleaned
        cleaned = (
            re.sub(r"\[.*?\]", "", cleaned.replace(" [title]", ". ")).replace("  ", " ").strip()
        )
    return cleaned or text


def _parse(row: Mapping[str, Any], index: int) -> Item:
    options = tuple(map(_clean, rows.texts(row, "endings")))
    return Item(
        task="hellaswag",
        id=rows.row_id(row, "hellaswag", index),
        question="",
        options=options,
        answer=rows.number(row, "label", 0, len(options) - 1),
        labels=rows.letters(options),
        context=_clean(rows.text(row, "ctx")),
    )


def _ask_label(item: Item) -> Prompt:
    return Prompt(
        before="Opening: ",
        context=item.context,
        after=f"\nWhich continuation is the likeliest?\n{lettered(item)}Answer:",
    )


def _ask_text(item: Item) -> Prompt:
    """The bare text: the answer continues it."""
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
    parse=_parse,
    ask_label=_ask_label,
    ask_text=_ask_text,
)
