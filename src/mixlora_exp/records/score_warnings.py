"""Warnings about a run's scores, from its record alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mixlora_exp.records.wilson import percent

FEWEST_ITEMS = 30
MOST_UNPARSED = 0.2
FREE_TEXT = "exact_match"
"""The protocol whose items have no options, and so no majority class to compare with."""

Score = Mapping[str, Any]


def _few(score: Score) -> str | None:
    return f"{score['n']} items" if score["n"] < FEWEST_ITEMS else None


def _constant(score: Score) -> str | None:
    if score["accuracy"] not in (0.0, 1.0):
        return None
    return "all right" if score["accuracy"] else "all wrong"


def _below(score: Score) -> str | None:
    accuracy, majority = score["accuracy"], score["majority_class"]
    if score["protocol"] == FREE_TEXT or majority is None or accuracy >= majority:
        return None
    return f"{percent(accuracy)} < {percent(majority)}"


def _unparsed(score: Score) -> str | None:
    unparsed = score.get("unparsed")
    if unparsed is None or unparsed <= MOST_UNPARSED * score["n"]:
        return None
    return f"{unparsed} of {score['n']}"


KINDS: tuple[tuple[str, Callable[[Score], str | None]], ...] = (
    ("too few items to tell settings apart", _few),
    ("a standard error of 0.0 is no certainty: all items have the same result", _constant),
    ("below the majority class: always the most frequent answer scores more", _below),
    ("many texts name no option and count as wrong: look at predictions/", _unparsed),
)


def score_warnings(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings about the scores of a finished run, one line for each kind, with the tasks."""
    for text, find in KINDS:
        found = [(score, find(score)) for score in record["scores"]]
        named = [f"{s['task']} {s['protocol']} ({why})" for s, why in found if why is not None]
        if named:
            yield f"warning: {text}: {', '.join(named)}"
