"""Rows of free text: a prompt and its completion, or the messages of a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from mixlora_exp.tasks import row_fields
from mixlora_exp.tasks.base import Item

# Digits in groups are one number only where they are grouped as numbers are: 3,4,5 are three. A
# minus belongs to what it touches, and not to a word before it (COVID-19).
_BETWEEN = "[,\u00a0\u2009\u202f]"
_DIGITS = rf"(?:\d{{1,3}}(?:{_BETWEEN}\d{{2,3}}){{0,9}}{_BETWEEN}\d{{3}}(?!\d)|\d{{1,31}})"
_NUMBER = rf"(?:(?<![\w.)])-)?(?:\$\s?)?(?:{_DIGITS}(?:\.\d{{1,30}})?|(?<!\d)\.\d{{1,30}})"
NUMBER = re.compile(_NUMBER)
_FRAC = rf"\\[dt]?frac\s?(?:{{\s?{_NUMBER}\s?}}\s?{{\s?{_NUMBER}\s?}}|\d\d)"
_WHOLE = rf"(?:{_NUMBER}\s?)?"
_SLASH = rf"(?:{_NUMBER}\s)?{_NUMBER}\s?/\s?{_NUMBER}(?!\.?\d|\s?/)"
VALUE = re.compile(rf"{_WHOLE}-?{_FRAC}|{_SLASH}|{_NUMBER}")
"""A number, or a fraction, also after a whole number; 12/25/2024 is none."""
_OPERATOR = r"\s*[-+*/x\u00d7\u00f7\u00b7]\s*"
_PART = rf"(?:-?{_FRAC}|{_NUMBER})"
SUM = re.compile(rf"{_PART}(?:{_OPERATOR}{_PART}){{1,30}}\s*=\s*({VALUE.pattern})")
"""An expression and what it comes to, as in `2 + 3 = 5`."""
MARKER = re.compile(r"####|answer is:?", re.IGNORECASE)
TEMPLATE = "Question: {question}\nAnswer:"
ROLES = ("system", "user", "assistant")


def final_number(text: str) -> Decimal | None:
    """Return the number that a solution ends with: the first one after the last `####` (GSM8K) or
    `answer is` (MetaMathQA) that has one; without either the last one in the text. None if there is
    none.

    After a marker an expression counts as what it is said to come to (`2 + 3 = 5`), and a fraction,
    in LaTeX too, as its quotient; elsewhere a fraction is two numbers.
    """
    # A minus sign of Unicode, and LaTeX's comma without a space.
    text = text.replace("\u2212", "-").replace("{,}", ",")
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1].start()
    ends = [marker.end() for marker in MARKER.finditer(text) if marker.end() <= last]
    if not ends:
        return _decimal(numbers[-1][0])
    first = VALUE.search(text, ends[-1])
    if first is None:
        return None
    said = SUM.match(text, first.start())
    return _value(first[0] if said is None else said[1])


def _value(text: str) -> Decimal | None:
    """Return the number that a match of `VALUE` stands for; None where it divides by 0."""
    if (short := re.search(r"frac\s?(\d)(\d)$", text)) is not None:
        text = f"{text[: short.start()]}frac{{{short[1]}}}{{{short[2]}}}"
    *whole, above, below = [Decimal(1), *map(_decimal, NUMBER.findall(text))][-3:]
    if len(NUMBER.findall(text)) == 1:
        return below
    if not below:
        return None
    found = above / below
    if len(NUMBER.findall(text)) == 3:
        found = whole[0] + (-found if text.startswith("-") else found)
    elif "-\\" in text:
        found = -found
    return found.normalize() + 0


def _decimal(text: str) -> Decimal:
    # Adding 0 makes 0 of -0.
    return Decimal(re.sub(r"[$,\s]", "", text)).normalize() + 0


def free_text_item(
    row: Mapping[str, Any],
    index: int,
    task: str,
    question: str,
    completion: str | None,
    instruction: str,
    template: str = TEMPLATE,
    context: str | None = None,
) -> Item:
    """Return the item of a row. `question`, `completion`, `context`: names of fields; without
    `completion`, `question` names a list of messages, of which the assistant's last one is the
    completion. The text of `context`, if it has any, follows the question after a line break.
    `template`: the prompt, with `{question}` in the place of the question.

    Raises:
        ValueError: a field is missing, or a message has no role or text.
    """
    if completion is None:
        *turns, last = _messages(row_fields.value(row, question), question)
        answer = last[1]
    else:
        turns, answer = [("user", row_fields.text(row, question))], row_fields.text(row, completion)
    more = row.get(context) if context is not None else None
    if more is not None and not isinstance(more, str):
        raise ValueError(f"field '{context}' must be text, not {type(more).__name__}")
    if more and more.strip():
        turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n{more.strip()}")
    if instruction:
        turns[-1] = (turns[-1][0], f"{turns[-1][1]} {instruction}")
    number = final_number(answer)
    label = "" if number is None else f"{number:f}"
    return Item(
        task=task,
        id=row_fields.row_id(row, task, index),
        question=template.replace("{question}", turns[-1][1]),
        options=(answer,),
        answer=0,
        labels=(label,),
        turns=tuple(turns),
    )


def with_labels(item: Item, row: Mapping[str, Any], field: str, labels: Sequence[str]) -> Item:
    """Return the item with `labels` instead of its final number, the right one, in `field`, first.

    Raises:
        ValueError: the field is missing, or has none of the labels.
    """
    right = row_fields.text(row, field)
    if right not in labels:
        raise ValueError(f"{field} {right!r} is not one of {', '.join(labels)}")
    return replace(item, labels=(right, *(label for label in labels if label != right)))


def first_named(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that occurs first in a text, as written; None if none does. Of several at
    the same place the longest."""
    places = {label: text.find(label) for label in labels}
    found = [label for label, place in places.items() if place >= 0]
    return min(found, key=lambda label: (places[label], -len(label)), default=None)


def _messages(found: Any, name: str) -> list[tuple[str, str]]:
    """Return the messages up to the assistant's last one, the user's before it."""
    if isinstance(found, str | bytes) or not isinstance(found, Sequence):
        raise ValueError(f"field '{name}' must be a list of messages, not {type(found).__name__}")
    turns = []
    for number, message in enumerate(found):
        where = f"field '{name}[{number}]'"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where} has role {role!r}, which is none of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where} has no content")
        turns.append((role, content))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if len(turns) < 2 or turns[-2][0] != "user":
        raise ValueError(f"field '{name}' has no message of the assistant after one of the user")
    return turns
