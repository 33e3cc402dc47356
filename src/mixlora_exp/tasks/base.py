"""What a multiple-choice item is, and how it is asked.

An item is asked in one of two forms. `label`: the prompt lists the options under letters and the
answer is a letter (BoolQ: true or false). `text`: the prompt leaves the options out and the answer
is the text of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixlora_exp.tasks.characters import check_characters

__all__ = ["Item", "Prompt", "Task", "lettered"]

LETTERS = "ABCDEFGH"


@dataclass(frozen=True, slots=True)
class Item:
    """One multiple-choice question of a task.

    `context` may be shortened when the example is too long; `question` and `options` never are.
    `answer` is the index of the right option; `labels` are what the options are called.
    """

    task: str
    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    labels: tuple[str, ...]
    context: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`before + context + after`; the answer follows after one space."""

    before: str
    context: str
    after: str

    @property
    def text(self) -> str:
        return self.before + self.context + self.after


@dataclass(frozen=True, slots=True)
class Task:
    """A data set of the paper: where it is on the hub, how a row is read, how an item is asked.

    `splits` maps this project's `train` and `test` to the hub's split names; `test` is the split
    that is scored. `sizes` are the official row counts of the two. `parse(row, index)` returns
    the item of an official-schema row and raises `ValueError` (what is wrong with the row,
    without naming the file) on one that does not fit. `ask_label` and `ask_text` build the prompts.
    """

    name: str
    title: str
    kind: str
    hub_id: str
    hub_config: str | None
    revision: str
    splits: Mapping[str, str]
    sizes: Mapping[str, int]
    parse: Callable[[Mapping[str, Any], int], Item]
    ask_label: Callable[[Item], Prompt]
    ask_text: Callable[[Item], Prompt]

    def read(self, row: Mapping[str, Any], index: int) -> Item:
        """The item of a row as a source has it: its characters are checked, then it is parsed.

        Raises:
            ValueError: what is wrong with the row, with the field and without the file.
        """
        check_characters(row)
        return self.parse(row, index)


def lettered(item: Item) -> str:
    """The options, one per line, as `A. text`."""
    return "".join(
        f"{label}. {option}\n" for label, option in zip(item.labels, item.options, strict=True)
    )
