"""BoolQ: a short passage and a question that it settles."""

from __future__ import annotations

from random import Random
from typing import Any

from mixlora_exp.tasks.embedded.draw import SIZES, draw_groups, facts_of, positions, share
from mixlora_exp.tasks.embedded.events import NAMES
from mixlora_exp.tasks.embedded.tables import Fact, with_article

__all__ = ["RELATIONS", "boolq"]

RELATIONS = ("kind", "material", "colour", "home", "capital")

OPENINGS = (
    "Our reader wrote to ask about {x}.",
    "Today's lesson is about {x}.",
    "This page of the little encyclopedia describes {x}.",
    "Children often want to know more about {x}.",
)

STATEMENTS = {
    "kind": ("In short, {x} is {ay}.", "is {x} {ay}"),
    "material": ("In most cases {x} is made of {y}.", "is {x} usually made of {y}"),
    "colour": ("The usual color of {x} is {y}.", "is {x} usually {y}"),
    "home": ("The home of {x} is {ay}.", "does {x} live in {ay}"),
    "capital": ("The capital of {x} is {y}.", "is {y} the capital of {x}"),
}

ERRANDS = (
    ("{n} went to the market with a basket and bought {a}.", "did {n} buy {a}"),
    ("{n} was given {a} as a present on Sunday.", "was {n} given {a}"),
    ("{n} took out a pencil and drew {a}.", "did {n} draw {a}"),
)


BUYABLE = ("flower", "fruit", "vegetable", "musical instrument", "tool", "piece of clothing")


def boolq(split: str, seed: int) -> list[dict[str, Any]]:
    """Two rows in three ask about a fact of the world, the third about a person's errand.

    Facts come in pairs: each is asked with its own answer, or with that of the other.
    """
    rng = Random(f"boolq-{split}-{seed}")
    count = SIZES[split]
    truths = [place == 0 for place in positions(count // 2, 2, rng)]
    world = draw_groups(facts_of(RELATIONS, split, seed), 2, rng)
    things = draw_groups(_buyable(split, seed), 2, rng)
    names = share(NAMES, "names", split, seed)
    rows: list[dict[str, Any]] = []
    for pair, truth in enumerate(truths):
        if pair % 3 == 2:
            group = next(things)
            rows += _errands(group, truth, rng.sample(names, 2), rng)
        else:
            group = next(world)
            rows += _facts(group, truth, rng)
    # A pair shares its truth value: both true or both false, and each answer is used once.
    rng.shuffle(rows)
    return rows


def _facts(group: tuple[Fact, ...], truth: bool, rng: Random) -> list[dict[str, Any]]:
    rows = []
    for fact, other in (group, group[::-1]):
        opening = rng.choice(OPENINGS).format(x=fact.noun)
        statement, question = STATEMENTS[fact.relation]
        asked = fact if truth else other
        sentence = statement.format(x=fact.noun, y=fact.answer, ay=_answer(fact))
        rows.append(
            {
                "question": question.format(x=fact.noun, y=asked.answer, ay=_answer(asked)).lower(),
                "passage": f"{opening} {sentence}",
                "answer": truth,
                "title": fact.subject,
                "facts": [fact.subject],
            }
        )
    return rows


def _errands(
    group: tuple[Fact, ...], truth: bool, names: list[str], rng: Random
) -> list[dict[str, Any]]:
    story, question = rng.choice(ERRANDS)
    rows = []
    for name, (fact, other) in zip(names, (group, group[::-1]), strict=True):
        asked = fact if truth else other
        rows.append(
            {
                "question": question.format(n=name, a=asked.noun).lower(),
                "passage": story.format(n=name, a=fact.noun),
                "answer": truth,
                "title": name,
                "facts": [name, fact.subject, other.subject],
            }
        )
    return rows


def _buyable(split: str, seed: int) -> list[Fact]:
    """Things that a person may buy, be given or draw."""
    return [fact for fact in facts_of(("kind",), split, seed) if fact.answer in BUYABLE]


def _answer(fact: Fact) -> str:
    """The answer, with an article where it is counted: a mammal, a hive."""
    return with_article(fact.answer) if fact.relation in ("kind", "home") else fact.answer
