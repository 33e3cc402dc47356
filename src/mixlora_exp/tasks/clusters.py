"""Which items of a task depend on one another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from mixlora_exp.tasks.base import Item

SHARED = 0.6
"""Share of the words that make two sentences of the same candidates twins. Of the 2,011 pairs that
WinoGrande's debiased training rows name by `qID` all reach it, and 30 further pairs, nearly all
near-copies."""


def _words(item: Item) -> Counter[str]:
    return Counter(re.findall(r"\w+", item.question.lower()))


def _alike(first: Counter[str], second: Counter[str]) -> bool:
    return (first & second).total() >= SHARED * max(first.total(), second.total())


def _twins(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Split items of the same candidates into groups of sentences that are alike."""
    groups: list[list[tuple[Item, Counter[str]]]] = []
    for item in items:
        own = (item, _words(item))
        near = [group for group in groups if any(_alike(own[1], words) for _, words in group)]
        groups = [group for group in groups if group not in near]
        groups.append([*(entry for group in near for entry in group), own])
    for group in groups:
        yield [item for item, _ in group]


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    by_key: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        candidates = sorted(option.lower() for option in item.options)
        key = ("candidates", *candidates) if item.task == "winogrande" else (
            item.context or item.question,
        )  # fmt: skip
        by_key.setdefault(key, []).append(item)
    for group in by_key.values():
        yield from _twins(group) if group[0].task == "winogrande" else [group]


def clusters(items: Iterable[Item]) -> dict[str, str]:
    """Item -> first item of its cluster, for the clusters of more than one item.

    A cluster shares its context (BoolQ's passage, SIQA's situation), its question where the task
    has no context, or is a pair of WinoGrande's twins: one sentence, changed so that the other of
    the same two candidates fills the blank.
    """
    found = [[item.id for item in group] for group in _groups(items)]
    return {own: ids[0] for ids in found if len(ids) > 1 for own in ids}
