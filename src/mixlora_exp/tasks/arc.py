"""ARC: school science questions with three to five options, an easy and a challenge part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item, Prompt, Task, lettered


def _parse(task: str, row: Mapping[str, Any], index: int) -> Item:
    options, answer = row_fields.choices(row)
    return Item(
        task=task,
        id=row_fields.row_id(row, task, index),
        question=row_fields.text(row, "question"),
        options=options,
        answer=answer,
        # Some rows number their options; every item is asked with letters.
        labels=row_fields.letters(options),
    )


def _parse_easy(row: Mapping[str, Any], index: int) -> Item:
    return _parse("arc_e", row, index)


def _parse_challenge(row: Mapping[str, Any], index: int) -> Item:
    return _parse("arc_c", row, index)


def _label_prompt(item: Item) -> Prompt:
    return Prompt(
        before=f"Science quiz: {item.question}\nWhich of these is correct?\n",
        context=item.context,
        after=f"{lettered(item)}Answer:",
    )


def _text_prompt(item: Item) -> Prompt:
    return Prompt(f"Science quiz: {item.question}\n", item.context, "Answer:")


def _task(
    name: str, title: str, hub_config: str, sizes: Mapping[str, int], characters: Mapping[str, int]
) -> Task:
    return Task(
        name=name,
        title=title,
        kind="Question Answering",
        hub_id="allenai/ai2_arc",
        hub_config=hub_config,
        revision="210d026faf9955653af8916fad021475a3f00453",
        splits={"train": "train", "test": "test"},
        sizes=sizes,
        characters=characters,
        parse=_parse_easy if name == "arc_e" else _parse_challenge,
        label_prompt=_label_prompt,
        text_prompt=_text_prompt,
    )


ARC_E = _task(
    "arc_e", "ARC-e", "ARC-Easy",
    sizes={"train": 2251, "test": 2376},
    characters={"label": 269, "text": 157},
)  # fmt: skip
ARC_C = _task(
    "arc_c", "ARC-c", "ARC-Challenge",
    sizes={"train": 1119, "test": 1172},
    characters={"label": 307, "text": 179},
)  # fmt: skip
