"""HellaSwag: the start of a text and four ways to go on; the text alone is asked, no label of
the activity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import rows
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered

__all__ = ["HELLASWAG"]


def _parse(row: Mapping[str, Any], index: int) -> Item:
    options = rows.texts(row, "endings")
    return Item(
        task="hellaswag",
        id=rows.row_id(row, "hellaswag", index),
        question="",
        options=options,
        answer=rows.number(row, "label", 0, len(options) - 1),
        labels=rows.letters(options),
        context=rows.text(row, "ctx"),
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
