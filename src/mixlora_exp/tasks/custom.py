"""Custom tasks, multiple-choice or free text, defined by the names of fields, without code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import LETTERS, Item, Prompt, Task, lettered
from mixlora_exp.tasks.free_text import TEMPLATE, free_text_item, with_labels


def label_prompt(item: Item) -> Prompt:
    """Return the prompt with context (if any), question and lettered options."""
    text = f"Question: {item.question}\n{lettered(item)}Answer:"
    return Prompt("Text: ", item.context, f"\n{text}") if item.context else Prompt("", "", text)


def text_prompt(item: Item) -> Prompt:
    """Return the prompt with context (if any) and question."""
    text = f"Question: {item.question}\nAnswer:"
    return Prompt("Text: ", item.context, f"\n{text}") if item.context else Prompt("", "", text)


def _options(row: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    if len(fields) == 1:
        return row_fields.texts(row, fields[0])
    return tuple(row_fields.text(row, name) for name in fields)


def _answer(
    row: Mapping[str, Any], name: str, options: Sequence[str], answer_as: str, count_from: int
) -> int:
    if answer_as == "index":
        return row_fields.number(row, name, count_from, count_from + len(options) - 1) - count_from
    given = row_fields.label(row_fields.text(row, name))
    if answer_as == "text":
        named = [row_fields.label(option) for option in options]
        if named.count(given) != 1:
            raise ValueError(f"{name} {given!r} is the text of {named.count(given)} of the options")
        return named.index(given)
    letter = given.strip(" .()").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise ValueError(f"{name} {given!r} is not one of {', '.join(LETTERS[: len(options)])}")
    return LETTERS.index(letter)


def custom_task(
    name: str,
    *,
    question: str,
    options: Sequence[str],
    answer: str,
    answer_as: str,
    count_from: int,
    context: str | None,
    instruction: str = "",
    template: str = TEMPLATE,
    labels: Sequence[str] = (),
    label: str | None = None,
) -> Task:
    """Return a task whose rows are read by field names.

    `options`: one field with a list of texts, or several fields with one text each. `answer_as`:
    whether the field `answer` contains an `index` (from `count_from`), a `letter` or the `text` of
    the correct option, or free text (a `completion`, or all `messages`).
    """

    def parse(row: Mapping[str, Any], index: int) -> Item:
        if answer_as in ("completion", "messages"):
            completion = answer if answer_as == "completion" else None
            item = free_text_item(
                row, index, name, question, completion, instruction, template, context
            )
            return item if label is None else with_labels(item, row, label, labels)
        found = _options(row, options)
        return Item(
            task=name,
            id=row_fields.row_id(row, name, index),
            question=row_fields.text(row, question),
            options=found,
            answer=_answer(row, answer, found, answer_as, count_from),
            labels=row_fields.letters(found),
            context="" if context is None else row_fields.text(row, context),
        )

    return Task(
        name=name,
        title=name,
        kind="Multiple Choice",
        hub_id="",
        hub_config=None,
        revision="",
        splits={},
        sizes={},
        characters={},
        parse=parse,
        label_prompt=label_prompt,
        text_prompt=text_prompt,
    )
