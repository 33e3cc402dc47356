"""Multiple-choice items, prompts and tasks.

An item is asked in one of two forms. `label`: the prompt lists the options with letters, and the
answer is a letter (BoolQ: true or false). `text`: the prompt omits the options, and the answer is
the text of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixlora_exp.tasks.characters import check_characters

LETTERS = "ABCDEFGH"


@dataclass(frozen=True, slots=True)
class Item:
    """One multiple-choice question of a task.

    `context` may be truncated if the example is too long; `question` and `options` never are.
    `answer`: index of the correct option; `labels`: one per option. Free text has one option, which
    is the text that should follow, as `question` the prompt, as `turns` the messages (role,
    content), and as label the final number or, of the labels that the text may name, the right one
    first.
    """

    task: str
    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    labels: tuple[str, ...]
    context: str = ""
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """`before + context + after`; the answer follows after one space."""

    before: str
    context: str
    after: str

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return self.before + self.context + self.after


@dataclass(frozen=True, slots=True)
class Task:
    """A data set: its location on the hub, its row format and its prompts.

    `splits` maps `train` and `test` (the scored split) to the hub's split names; `sizes`: official
    row counts of the two. `characters`: by form, the mean length of prompt and answer over the
    training split, for plans without data. `parse(row, index)` returns the item of a row in the
    official schema, or raises `ValueError` with the error, without the file's name.
    `label_prompt` and `text_prompt` build the prompts.
    """

    name: str
    title: str
    kind: str
    hub_id: str
    hub_config: str | None
    revision: str
    splits: Mapping[str, str]
    sizes: Mapping[str, int]
    characters: Mapping[str, int]
    parse: Callable[[Mapping[str, Any], int], Item]
    label_prompt: Callable[[Item], Prompt]
    text_prompt: Callable[[Item], Prompt]

    def read(self, row: Mapping[str, Any], index: int) -> Item:
        """Return the item of a row: checks its characters and parses it.

        Raises:
            ValueError: the row is not valid; the message names the field, but not the file.
        """
        check_characters(row)
        return self.parse(row, index)


def lettered(item: Item) -> str:
    """Return the options, one per line, as `A. text`."""
    return "".join(
        f"{label}. {option}\n" for label, option in zip(item.labels, item.options, strict=True)
    )
