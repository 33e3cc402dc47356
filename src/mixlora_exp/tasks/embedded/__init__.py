"""Eight small tasks in the official schemas, made from general knowledge that ships with the code.

They need no network and no download, and serve to try the whole pipeline: a small pretrained
model gets better at them within minutes. Scores on them say nothing about the real data sets.
"""

from __future__ import annotations

from typing import Any

from mixlora_exp.tasks.embedded.people import hellaswag, piqa, siqa
from mixlora_exp.tasks.embedded.reading import boolq
from mixlora_exp.tasks.embedded.science import multiple_choice
from mixlora_exp.tasks.embedded.twins import winogrande

__all__ = ["facts_used", "rows"]

_MAKERS = {
    "boolq": boolq,
    "piqa": piqa,
    "siqa": siqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
}


def rows(task: str, split: str, seed: int) -> list[dict[str, Any]]:
    """The rows of a task's `train` or `test` split, the same for the same seed.

    Each has the official fields, and `facts`: the things, people and events it is about. No
    test row of any task shares one of them with a training row of any task.
    """
    if task in ("arc_e", "arc_c", "obqa"):
        return multiple_choice(task, split, seed)
    return _MAKERS[task](split, seed)


def facts_used(task: str, split: str, seed: int) -> frozenset[str]:
    """Everything that the rows of a split are about."""
    return frozenset(fact for row in rows(task, split, seed) for fact in row["facts"])
