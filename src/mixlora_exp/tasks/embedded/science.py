"""ARC and OpenBookQA: four options about kinds, uses, materials, opposites, jobs, causes."""

from __future__ import annotations

from random import Random
from typing import Any

from mixlora_exp.tasks.embedded.draw import SIZES, arrange, draw_groups, facts_of, positions
from mixlora_exp.tasks.embedded.tables import Fact, with_article

__all__ = ["RELATIONS", "multiple_choice"]

RELATIONS = {
    "arc_e": ("kind", "colour", "material"),
    "arc_c": ("use", "young", "home", "sound", "capital", "material"),
    "obqa": ("opposite", "job", "place", "cause"),
}

FORWARD = {
    "kind": ("What kind of thing is {x}?", "To which group does {x} belong?"),
    "colour": ("What color is {x} usually?", "Which color does {x} have?"),
    "material": ("What is {x} usually made of?", "Which material is used for {x}?"),
    "use": ("What is {x} used for?", "What do people do with {x}?"),
    "young": ("What is the young of {x} called?", "What is the name for the offspring of {x}?"),
    "home": ("Where does {x} live?", "In what kind of place is {x} at home?"),
    "sound": ("Which sound does {x} make?", "What is the typical noise of {x}?"),
    "capital": ("What is the capital of {x}?", "In which capital city does {x} have its seat?"),
    "opposite": ("The opposite of {x} is", "The word that means the reverse of {x} is"),
    "job": ("{x} is a person who", "{x} goes to work and"),
    "place": ("The place where {x} is most often found is the", "{x} belongs in the"),
    "cause": ("When {x},", "What happens when {x}?"),
}

BACKWARD = {
    "kind": "Which of these is {y}?",
    "use": "Which of these would you take to {y}?",
    "material": "Which of these is usually made of {y}?",
    "home": "Who or what lives in {y}?",
}

COUNTED = ("kind", "home")
"""Relations whose answers are things that are counted: a mammal, a hive."""


def multiple_choice(task: str, split: str, seed: int) -> list[dict[str, Any]]:
    """Rows in the schema that ARC and OpenBookQA share, with `question` or `question_stem`."""
    rng = Random(f"{task}-{split}-{seed}")
    count = SIZES[split]
    places = positions(count, 4, rng)
    field = "question_stem" if task == "obqa" else "question"
    rows: list[dict[str, Any]] = []
    for group in draw_groups(facts_of(RELATIONS[task], split, seed), 4, rng):
        form = rng.randrange(3 if group[0].relation in BACKWARD else 2)
        for fact in group:
            place = places[len(rows)]
            question, options, facts = _ask(form, fact, group, place, rng)
            rows.append(
                {
                    "id": f"{task}-{split}-{len(rows)}",
                    field: question,
                    "choices": {"text": options, "label": ["A", "B", "C", "D"]},
                    "answerKey": "ABCD"[place],
                    "facts": facts,
                }
            )
        if len(rows) == count:
            return rows
    raise AssertionError("draw_groups is endless")


def _ask(
    form: int, fact: Fact, group: tuple[Fact, ...], place: int, rng: Random
) -> tuple[str, list[str], list[str]]:
    """A question about the fact, in one of two wordings; the third form asks for the thing."""
    others = [other for other in group if other is not fact]
    if form == 2:
        answer = with_article(fact.answer) if fact.relation in COUNTED else fact.answer
        nouns = [other.noun for other in others]
        options = arrange(fact.noun, nouns, place, rng)
        return BACKWARD[fact.relation].format(y=answer), options, [one.subject for one in group]
    question = FORWARD[fact.relation][form].format(x=fact.noun)
    options = arrange(fact.answer, [other.answer for other in others], place, rng)
    return question[0].upper() + question[1:], options, [fact.subject]
