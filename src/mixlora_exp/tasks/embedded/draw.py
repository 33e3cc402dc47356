"""Drawing from the knowledge: which facts a split may use, groups of facts, answer positions.

Rows are built from groups of facts with different answers, and every fact of a group is asked
once with the answers of the whole group as options. So each option is right exactly as often as
chance has it, and an option tells nothing without its question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from mixlora_exp.tasks.embedded.events import FEELINGS, MOTIVES, NEXT_STEPS
from mixlora_exp.tasks.embedded.kinds import KINDS
from mixlora_exp.tasks.embedded.nature import (
    CAPITALS,
    COLOURS,
    HOMES,
    MATERIALS,
    SOUNDS,
    USES,
    YOUNG,
)
from mixlora_exp.tasks.embedded.practice import GOALS
from mixlora_exp.tasks.embedded.scenes import SCENES
from mixlora_exp.tasks.embedded.society import CAUSES, JOBS, OPPOSITES, PLACES
from mixlora_exp.tasks.embedded.tables import Fact

__all__ = ["SIZES", "arrange", "draw_groups", "facts_of", "positions", "share"]

SIZES = {"train": 360, "test": 96}
"""Rows per task; whole groups of two, three and four fit."""

TEST_SHARE = 0.25

_ALL: tuple[Fact, ...] = (
    *KINDS, *CAPITALS, *COLOURS, *HOMES, *MATERIALS, *SOUNDS, *USES, *YOUNG,
    *CAUSES, *JOBS, *OPPOSITES, *PLACES, *GOALS, *FEELINGS, *MOTIVES, *NEXT_STEPS, *SCENES,
)  # fmt: skip


def facts_of(relations: Sequence[str], split: str, seed: int) -> list[Fact]:
    """The facts of the relations that belong to the split.

    A subject belongs to one split in every relation and every task, so a mixture of tasks
    has no test subject among its training rows either.
    """
    owner: dict[str, str] = {}
    rng = Random(f"facts-{seed}")
    for relation in dict.fromkeys(fact.relation for fact in _ALL):
        subjects = [fact.subject for fact in _ALL if fact.relation == relation]
        rng.shuffle(subjects)
        wanted = round(len(subjects) * TEST_SHARE)
        wanted -= sum(owner.get(subject) == "test" for subject in subjects)
        for subject in subjects:
            if subject not in owner:
                owner[subject] = "test" if wanted > 0 else "train"
                wanted -= 1
    return [fact for fact in _ALL if fact.relation in relations and owner[fact.subject] == split]


def share(names: Sequence[str], what: str, split: str, seed: int) -> list[str]:
    """The split's part of a list of names."""
    shuffled = list(names)
    Random(f"{what}-{seed}").shuffle(shuffled)
    cut = round(len(shuffled) * TEST_SHARE)
    return shuffled[:cut] if split == "test" else shuffled[cut:]


def draw_groups(facts: Sequence[Fact], size: int, rng: Random) -> Iterator[tuple[Fact, ...]]:
    """Endless rounds of groups of `size` facts of one relation, with different answers.

    In a round no fact is used twice, and almost all are used.
    """
    while True:
        groups = []
        for relation in dict.fromkeys(fact.relation for fact in facts):
            left = [fact for fact in facts if fact.relation == relation]
            rng.shuffle(left)
            groups += _split_into_groups(left, size)
        if not groups:
            raise ValueError("too few facts with different answers to form a group")
        rng.shuffle(groups)
        yield from groups


def _split_into_groups(left: list[Fact], size: int) -> list[tuple[Fact, ...]]:
    """Take each group from the most frequent answers, so that few facts are left over."""
    by_answer: dict[str, list[Fact]] = {}
    for fact in left:
        by_answer.setdefault(fact.answer, []).append(fact)
    groups = []
    while len(by_answer) >= size:
        fullest = sorted(by_answer, key=lambda answer: -len(by_answer[answer]))[:size]
        groups.append(tuple(by_answer[answer].pop() for answer in fullest))
        by_answer = {answer: facts for answer, facts in by_answer.items() if facts}
    return groups


def positions(rows: int, options: int, rng: Random) -> list[int]:
    """Where the right option stands in each row: every place equally often, in random order."""
    places = [index % options for index in range(rows)]
    rng.shuffle(places)
    return places


def arrange(right: str, others: Sequence[str], place: int, rng: Random) -> list[str]:
    """The options in random order, the right one at `place`."""
    options = list(others)
    rng.shuffle(options)
    options.insert(place, right)
    return options
