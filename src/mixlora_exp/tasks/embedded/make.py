"""Rows of the eight tasks, asked about facts that are drawn; each task in its official schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from mixlora_exp.tasks.embedded.draw import (
    SIZES,
    Fact,
    arrange,
    draw_groups,
    facts_of,
    lines,
    names_of,
    positions,
    with_article,
)

Row = dict[str, Any]

ASKED = {
    "arc_e": ("kind", "colour", "material"),
    "arc_c": ("use", "young", "home", "sound", "capital", "material"),
    "obqa": ("opposite", "job", "place", "cause"),
    "boolq": ("kind", "material", "colour", "home", "capital"),
    "siqa": ("feeling", "next", "motive"),
    "piqa": ("goal",),
    "hellaswag": ("scene: indoors", "scene: out of doors"),
}
"""The relations whose facts a task asks for."""
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
    "feeling": ("How does {n} feel now?", "What feeling does this leave {n} with?"),
    "next": ("What will {n} do next?", "What is {n} going to do now?"),
    "motive": ("Why did {n} do this?", "What did {n} have in mind?"),
}
BACKWARD = {
    "kind": "Which of these is {y}?",
    "use": "Which of these would you take to {y}?",
    "material": "Which of these is usually made of {y}?",
    "home": "Who or what lives in {y}?",
}
GOALS = ("How to {x}", "{X}.", "The best way to {x}")
MEANS = ("Use {y}.", "Get {y} for this.", "Do it with {y}.")
PERSONS = ("man", "woman", "girl", "boy", "teacher", "student", "neighbor", "tourist")
OPENINGS = (
    "Our reader wrote to ask about {x}.",
    "Today's lesson is about {x}.",
    "This page of the little encyclopedia describes {x}.",
    "Children often want to know more about {x}.",
)
STATEMENTS = {
    "kind": ("In short, {x} is {y}.", "is {x} {y}"),
    "material": ("In most cases {x} is made of {y}.", "is {x} usually made of {y}"),
    "colour": ("The usual color of {x} is {y}.", "is {x} usually {y}"),
    "home": ("The home of {x} is {y}.", "does {x} live in {y}"),
    "capital": ("The capital of {x} is {y}.", "is {y} the capital of {x}"),
}
ERRANDS = (
    ("{n} went to the market with a basket and bought {a}.", "did {n} buy {a}"),
    ("{n} was given {a} as a present on Sunday.", "was {n} given {a}"),
    ("{n} took out a pencil and drew {a}.", "did {n} draw {a}"),
)
BUYABLE = ("flower", "fruit", "vegetable", "musical instrument", "tool", "piece of clothing")
TWIN_THINGS = ("musical instrument", "tool", "piece of clothing", "piece of furniture")


class Drawn(NamedTuple):
    """A fact to ask for: the others of its group, where its answer is to stand, its row's number,
    and what was drawn once for its group."""

    fact: Fact
    group: tuple[Fact, ...]
    place: int
    index: int
    common: Any

    @property
    def others(self) -> list[Fact]:
        """The other facts of the group."""
        return [other for other in self.group if other is not self.fact]

    def answers(self, rng: Random) -> list[str]:
        """Return the options in their order: this fact's answer at `place`, those of the others
        shuffled."""
        return arrange(self.fact.answer, [one.answer for one in self.others], self.place, rng)


def _draw(
    task: str, split: str, seed: int, options: int, rng: Random,
    once: Callable[[tuple[Fact, ...]], Any] = lambda group: None,
) -> Iterator[Drawn]:  # fmt: skip
    """Yield the facts that the rows of a split ask for; `once` draws something for each group."""
    places = positions(SIZES[split], options, rng)
    groups = draw_groups(facts_of(ASKED[task], split, seed), options, rng)
    index = 0
    while index < SIZES[split]:
        group = next(groups)
        common = once(group)
        for fact in group:
            yield Drawn(fact, group, places[index], index, common)
            index += 1


def _counted(fact: Fact) -> str:
    """Return the answer, with an article where it is counted: a mammal, a hive."""
    return with_article(fact.answer) if fact.relation in ("kind", "home") else fact.answer


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def multiple_choice(task: str, split: str, seed: int, rng: Random) -> Iterator[Row]:
    """Yield rows of ARC and OpenBookQA: four options. A question has one of two wordings, or asks
    for the thing by its answer."""

    def form(group: tuple[Fact, ...]) -> int:
        return rng.randrange(3 if group[0].relation in BACKWARD else 2)

    for drawn in _draw(task, split, seed, 4, rng, form):
        fact = drawn.fact
        if drawn.common == 2:
            question = BACKWARD[fact.relation].format(y=_counted(fact))
            nouns = [other.noun for other in drawn.others]
            options = arrange(fact.noun, nouns, drawn.place, rng)
            facts = [one.subject for one in drawn.group]
        else:
            question = _capital(FORWARD[fact.relation][drawn.common].format(x=fact.noun))
            options, facts = drawn.answers(rng), [fact.subject]
        yield {
            "id": f"{task}-{split}-{drawn.index}",
            "question_stem" if task == "obqa" else "question": question,
            "choices": {"text": options, "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[drawn.place],
            "facts": facts,
        }


def siqa(task: str, split: str, seed: int, rng: Random) -> Iterator[Row]:
    """Yield questions on what somebody feels, does next or had in mind; wrong replies suit other
    events."""
    names = names_of(split, seed)
    for drawn in _draw(task, split, seed, 3, rng):
        name, fact = rng.choice(names), drawn.fact
        answers = drawn.answers(rng)
        yield {
            "context": f"{name} {fact.noun}.",
            "question": rng.choice(FORWARD[fact.relation]).format(n=name),
            **dict(zip(("answerA", "answerB", "answerC"), answers, strict=True)),
            "label": str(drawn.place + 1),
            "facts": [name, fact.subject],
        }


def piqa(task: str, split: str, seed: int, rng: Random) -> Iterator[Row]:
    """Yield a goal and two tools; the wrong tool is the right one of another goal."""
    for drawn in _draw(task, split, seed, 2, rng, lambda group: rng.choice(MEANS)):
        first, second = drawn.answers(rng)
        goal = drawn.fact.noun
        yield {
            "goal": rng.choice(GOALS).format(x=goal, X=_capital(goal)),
            "sol1": drawn.common.format(y=first),
            "sol2": drawn.common.format(y=second),
            "label": drawn.place,
            "facts": [drawn.fact.subject],
        }


def hellaswag(task: str, split: str, seed: int, rng: Random) -> Iterator[Row]:
    """Yield a scene and four ways to go on, all of them from the same setting."""
    for drawn in _draw(task, split, seed, 4, rng):
        person, fact = rng.choice(PERSONS), drawn.fact
        start, then = f"A {person} {fact.noun}.", f"The {person}"
        yield {
            "ind": drawn.index,
            "activity_label": fact.relation.removeprefix("scene: ").capitalize(),
            "ctx_a": start,
            "ctx_b": then,
            "ctx": f"{start} {then}",
            "endings": drawn.answers(rng),
            "label": str(drawn.place),
            "facts": [fact.subject],
        }


def boolq(task: str, split: str, seed: int, rng: Random) -> list[Row]:
    """Return a short passage and a question that it settles: two rows in three about a fact of the
    world, the third about a person's errand.

    Facts come in pairs: each is asked with its own answer, or with that of the other; a pair is
    true or false together, and each answer is used once.
    """
    truths = [place == 0 for place in positions(SIZES[split] // 2, 2, rng)]
    world = draw_groups(facts_of(ASKED[task], split, seed), 2, rng)
    kinds = facts_of(("kind",), split, seed)
    things = draw_groups([fact for fact in kinds if fact.answer in BUYABLE], 2, rng)
    names = names_of(split, seed)
    rows: list[Row] = []
    for pair, truth in enumerate(truths):
        if pair % 3 == 2:
            group = next(things)
            rows += _errands(group, truth, rng.sample(names, 2), rng)
        else:
            group = next(world)
            rows += _statements(group, truth, rng)
    rng.shuffle(rows)
    return rows


def _statements(group: tuple[Fact, ...], truth: bool, rng: Random) -> Iterator[Row]:
    for fact, other in (group, group[::-1]):
        opening = rng.choice(OPENINGS).format(x=fact.noun)
        statement, question = STATEMENTS[fact.relation]
        yield {
            "question": question.format(x=fact.noun, y=_counted(fact if truth else other)).lower(),
            "passage": f"{opening} {statement.format(x=fact.noun, y=_counted(fact))}",
            "answer": truth,
            "title": fact.subject,
            "facts": [fact.subject],
        }


def _errands(
    group: tuple[Fact, ...], truth: bool, names: Sequence[str], rng: Random
) -> Iterator[Row]:
    story, question = rng.choice(ERRANDS)
    for name, (fact, other) in zip(names, (group, group[::-1]), strict=True):
        yield {
            "question": question.format(n=name, a=(fact if truth else other).noun).lower(),
            "passage": story.format(n=name, a=fact.noun),
            "answer": truth,
            "title": name,
            "facts": [name, fact.subject, other.subject],
        }


def winogrande(task: str, split: str, seed: int, rng: Random) -> list[Row]:
    """Return sentences in twins with the same two candidates, of which each is right once: one
    changed phrase moves the blank from one to the other."""
    names = names_of(split, seed)
    things = [f.subject for f in facts_of(("kind",), split, seed) if f.answer in TWIN_THINGS]
    places = positions(SIZES[split], 2, rng)
    pools = {"twins_people": names, "twins_things": things}
    patterns = [(line.split(" | "), pool) for name, pool in pools.items() for line in lines(name)]
    rows: list[Row] = []
    while len(rows) < SIZES[split]:
        (sentence, *phrases), pool = patterns[len(rows) // 2 % len(patterns)]
        pair = rng.sample(pool, 2)
        for right, other, phrase in zip(pair, pair[::-1], phrases, strict=True):
            place = places[len(rows)]
            options = arrange(right, [other], place, rng)
            rows.append(
                {
                    "sentence": sentence.format(a=pair[0], b=pair[1], t=phrase),
                    "option1": options[0],
                    "option2": options[1],
                    "answer": str(place + 1),
                    "facts": pair,
                }
            )
    rng.shuffle(rows)
    return rows


MAKERS = {
    "boolq": boolq, "piqa": piqa, "siqa": siqa, "hellaswag": hellaswag, "winogrande": winogrande,
}  # fmt: skip


def rows(task: str, split: str, seed: int) -> list[Row]:
    """Return the rows of a task's `train` or `test` split, the same for the same seed.

    Each has the official fields, and `facts`: the things, people and events it is about. No
    test row of any task shares one of them with a training row of any task.
    """
    maker = MAKERS.get(task, multiple_choice)
    return list(maker(task, split, seed, Random(f"{task}-{split}-{seed}")))
