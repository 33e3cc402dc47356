"""Items as tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a prompt, and of each possible answer after it. `shortened`: the context was
    truncated."""

    prompt: list[int]
    answers: list[list[int]]
    shortened: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A training example: the last `answer_length` of `input_ids` are the answer with its EOS.
    `shortened`: the context was truncated."""

    input_ids: list[int]
    answer_length: int
    task: str
    shortened: bool = False
