"""The knowledge in `facts/`, and drawing from it: splits, groups of facts, answer positions.

A file has a line per fact, `subject = answer`, or several with one answer, `answer: subject;
subject`; lines that begin with `#` explain. Rows are built from groups of facts with different
answers, and every fact of a group is asked once with the answers of the whole group as options:
so each option is right exactly as often as chance has it, and tells nothing without its question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from random import Random
from typing import NamedTuple

SIZES = {"train": 360, "test": 96}
"""Rows per task; whole groups of two, three and four fit."""
TEST_SHARE = 0.25

RELATIONS = {
    "kind": "kind",
    "kind_uncounted": "kind",
    **{name: name for name in ("capital", "colour", "home", "material", "sound", "use", "young")},
    **{name: name for name in ("cause", "job", "opposite", "place")},
    **{name: name for name in ("goal", "feeling", "motive", "next")},
    "scene_indoors": "scene: indoors",
    "scene_out_of_doors": "scene: out of doors",
}
"""File in `facts/` -> the relation whose facts it has."""
ARTICLE = ("kind", "colour", "home", "material", "sound", "use", "young", "job", "place")
"""Files whose subjects take an article."""


class Fact(NamedTuple):
    """`noun` (the subject, with its article if it takes one) is in `relation` to `answer`."""

    relation: str
    subject: str
    noun: str
    answer: str


def with_article(noun: str) -> str:
    """Return `an owl`, `a lion`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


@cache
def lines(name: str) -> tuple[str, ...]:
    """Return the lines of `facts/NAME.txt` that say something."""
    text = (files(__package__) / "facts" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


@cache
def all_facts() -> tuple[Fact, ...]:
    """Return the facts of all relations, in the order of the files `facts/NAME.txt`."""
    found = []
    for name, relation in RELATIONS.items():
        for line in lines(name):
            subject, one, answer = line.partition(" = ")
            if one:
                entries = [(subject, answer)]
            else:
                answer, _, rest = line.partition(": ")
                entries = [(subject, answer) for subject in rest.split("; ")]
            for subject, answer in entries:
                noun = with_article(subject) if name in ARTICLE else subject
                found.append(Fact(relation, subject, noun, answer))
    return tuple(found)


def facts_of(relations: Sequence[str], split: str, seed: int) -> list[Fact]:
    """Return the facts of the relations that belong to the split.

    A subject belongs to one split in every relation and every task, so a mixture of tasks
    has no test subject among its training rows either.
    """
    owner: dict[str, str] = {}
    rng = Random(f"facts-{seed}")
    for relation in dict.fromkeys(RELATIONS.values()):
        subjects = [fact.subject for fact in all_facts() if fact.relation == relation]
        rng.shuffle(subjects)
        wanted = round(len(subjects) * TEST_SHARE)
        wanted -= sum(owner.get(subject) == "test" for subject in subjects)
        for subject in subjects:
            if subject not in owner:
                owner[subject] = "test" if wanted > 0 else "train"
                wanted -= 1
    return [f for f in all_facts() if f.relation in relations and owner[f.subject] == split]


def names_of(split: str, seed: int) -> list[str]:
    """Return the split's part of people's names."""
    shuffled = " ".join(lines("names")).split()
    Random(f"names-{seed}").shuffle(shuffled)
    cut = round(len(shuffled) * TEST_SHARE)
    return shuffled[:cut] if split == "test" else shuffled[cut:]


def draw_groups(facts: Sequence[Fact], size: int, rng: Random) -> Iterator[tuple[Fact, ...]]:
    """Yield endless rounds of groups of `size` facts of one relation, with different answers.

    In a round no fact is used twice, and almost all are used.

    Raises:
        ValueError: too few facts have different answers.
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
    """Return the right option's place in each row: every place equally often, in random order."""
    places = [index % options for index in range(rows)]
    rng.shuffle(places)
    return places


def arrange(right: str, others: Sequence[str], place: int, rng: Random) -> list[str]:
    """Return the options in random order, the right one at `place`."""
    options = list(others)
    rng.shuffle(options)
    options.insert(place, right)
    return options
