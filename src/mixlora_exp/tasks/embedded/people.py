"""SIQA, PIQA and HellaSwag: what people feel and do, what serves a goal, how a scene goes on."""

from __future__ import annotations

from random import Random
from typing import Any

from mixlora_exp.tasks.embedded.draw import SIZES, arrange, draw_groups, facts_of, positions, share
from mixlora_exp.tasks.embedded.events import NAMES
from mixlora_exp.tasks.embedded.scenes import SCENES

__all__ = ["hellaswag", "piqa", "siqa"]

QUESTIONS = {
    "feeling": ("How does {n} feel now?", "What feeling does this leave {n} with?"),
    "next": ("What will {n} do next?", "What is {n} going to do now?"),
    "motive": ("Why did {n} do this?", "What did {n} have in mind?"),
}

PERSONS = ("man", "woman", "girl", "boy", "teacher", "student", "neighbor", "tourist")

GOALS = ("How to {x}", "{X}.", "The best way to {x}")
MEANS = ("Use {y}.", "Get {y} for this.", "Do it with {y}.")


def siqa(split: str, seed: int) -> list[dict[str, Any]]:
    """What somebody feels, does next or had in mind; the other replies suit other events."""
    rng = Random(f"siqa-{split}-{seed}")
    names = share(NAMES, "names", split, seed)
    places = positions(SIZES[split], 3, rng)
    groups = draw_groups(facts_of(tuple(QUESTIONS), split, seed), 3, rng)
    rows: list[dict[str, Any]] = []
    while len(rows) < SIZES[split]:
        group = next(groups)
        for fact in group:
            name = rng.choice(names)
            place = places[len(rows)]
            others = [other.answer for other in group if other is not fact]
            answers = arrange(fact.answer, others, place, rng)
            rows.append(
                {
                    "context": f"{name} {fact.noun}.",
                    "question": rng.choice(QUESTIONS[fact.relation]).format(n=name),
                    **dict(zip(("answerA", "answerB", "answerC"), answers, strict=True)),
                    "label": str(place + 1),
                    "facts": [name, fact.subject],
                }
            )
    return rows


def piqa(split: str, seed: int) -> list[dict[str, Any]]:
    """A goal and two tools; the wrong tool is the right one of another goal."""
    rng = Random(f"piqa-{split}-{seed}")
    places = positions(SIZES[split], 2, rng)
    groups = draw_groups(facts_of(("goal",), split, seed), 2, rng)
    rows: list[dict[str, Any]] = []
    while len(rows) < SIZES[split]:
        group = next(groups)
        means = rng.choice(MEANS)
        for fact, other in (group, group[::-1]):
            place = places[len(rows)]
            first, second = arrange(fact.answer, [other.answer], place, rng)
            goal = fact.noun
            asked = rng.choice(GOALS).format(x=goal, X=goal[0].upper() + goal[1:])
            rows.append(
                {
                    "goal": asked,
                    "sol1": means.format(y=first),
                    "sol2": means.format(y=second),
                    "label": place,
                    "facts": [fact.subject],
                }
            )
    return rows


def hellaswag(split: str, seed: int) -> list[dict[str, Any]]:
    """A scene and four ways to go on, all of them from the same setting."""
    rng = Random(f"hellaswag-{split}-{seed}")
    settings = tuple(dict.fromkeys(fact.relation for fact in SCENES))
    places = positions(SIZES[split], 4, rng)
    groups = draw_groups(facts_of(settings, split, seed), 4, rng)
    rows: list[dict[str, Any]] = []
    while len(rows) < SIZES[split]:
        group = next(groups)
        for fact in group:
            person = rng.choice(PERSONS)
            place = places[len(rows)]
            others = [other.answer for other in group if other is not fact]
            start, then = f"A {person} {fact.noun}.", f"The {person}"
            rows.append(
                {
                    "ind": len(rows),
                    "activity_label": fact.relation.removeprefix("scene: ").capitalize(),
                    "ctx_a": start,
                    "ctx_b": then,
                    "ctx": f"{start} {then}",
                    "endings": arrange(fact.answer, others, place, rng),
                    "label": str(place),
                    "facts": [fact.subject],
                }
            )
    return rows
