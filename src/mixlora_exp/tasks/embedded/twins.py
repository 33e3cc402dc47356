"""WinoGrande: sentences in twins; one changed phrase moves the blank from one candidate to the
other."""

from __future__ import annotations

from random import Random
from typing import Any

from mixlora_exp.tasks.embedded.draw import SIZES, arrange, facts_of, positions, share
from mixlora_exp.tasks.embedded.events import NAMES

__all__ = ["winogrande"]

PEOPLE = (
    ("{a} lent {b} some money because _ {t}.", "had plenty to spare", "was short of cash"),
    ("{a} asked {b} for help because _ {t}.", "was stuck", "knew the answer"),
    ("{a} thanked {b} because _ {t}.", "had received a gift", "had given a gift"),
    ("{a} carried {b} home because _ {t}.", "was strong enough", "had a broken leg"),
    ("{a} lost the race to {b} because _ {t}.", "ran too slowly", "ran much faster"),
    ("{a} gave {b} swimming lessons because _ {t}.", "swam well", "could not swim"),
    ("{a} said sorry to {b} because _ {t}.", "had been rude", "had been insulted"),
    ("{a} could not hear {b} because _ {t}.", "wore earplugs", "spoke too softly"),
    ("{a} hired {b} because _ {t}.", "needed a worker", "needed a job"),
    ("{a} hid from {b} because _ {t}.", "was scared", "was scary"),
)

THINGS = (
    ("The {a} costs more than the {b}, so the _ is {t}.", "the dearer one", "the cheaper one"),
    ("The {a} weighs more than the {b}, so the _ is {t}.", "harder to lift", "easier to lift"),
    ("Because the {a} is newer than the {b}, the _ looks {t}.", "less worn", "more worn"),
    ("I sold the {a} and kept the {b} because the _ was {t}.", "useless", "still useful"),
)

THING_KINDS = ("musical instrument", "tool", "piece of clothing", "piece of furniture")


def winogrande(split: str, seed: int) -> list[dict[str, Any]]:
    """Rows come in twins with the same two candidates, of which each is right once."""
    rng = Random(f"winogrande-{split}-{seed}")
    names = share(NAMES, "names", split, seed)
    things = [f.subject for f in facts_of(("kind",), split, seed) if f.answer in THING_KINDS]
    places = positions(SIZES[split], 2, rng)
    patterns = (*((p, names) for p in PEOPLE), *((p, things) for p in THINGS))
    rows: list[dict[str, Any]] = []
    while len(rows) < SIZES[split]:
        (sentence, first_phrase, second_phrase), pool = patterns[len(rows) // 2 % len(patterns)]
        first, second = rng.sample(pool, 2)
        for right, other, phrase in (
            (first, second, first_phrase),
            (second, first, second_phrase),
        ):
            place = places[len(rows)]
            options = arrange(right, [other], place, rng)
            rows.append(
                {
                    "sentence": sentence.format(a=first, b=second, t=phrase),
                    "option1": options[0],
                    "option2": options[1],
                    "answer": str(place + 1),
                    "facts": [first, second],
                }
            )
    rng.shuffle(rows)
    return rows
