"""How the knowledge is written down: lines of text, read into plain tuples."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Fact", "headed", "lines", "members", "pairs", "with_article"]


class Fact(NamedTuple):
    """`noun` (the subject, with its article if it takes one) is in `relation` to `answer`."""

    relation: str
    subject: str
    noun: str
    answer: str


def lines(block: str) -> tuple[str, ...]:
    """The non-empty lines of a block."""
    return tuple(line.strip() for line in block.splitlines() if line.strip())


def members(block: str) -> dict[str, tuple[str, ...]]:
    """Lines `key: one, two, three`; a key may continue on a second line of its own."""
    found: dict[str, tuple[str, ...]] = {}
    for line in lines(block):
        key, _, rest = line.partition(":")
        found[key] = found.get(key, ()) + tuple(part.strip() for part in rest.split(","))
    return found


def pairs(block: str) -> tuple[tuple[str, str], ...]:
    """Entries `left = right`, several on a line between semicolons."""
    entries = [part for line in lines(block) for part in line.split(";") if part.strip()]
    split = (entry.partition("=") for entry in entries)
    return tuple((left.strip(), right.strip()) for left, _, right in split)


def headed(relation: str, block: str) -> tuple[Fact, ...]:
    """Lines `answer |`, each followed by lines of subjects between semicolons."""
    facts = []
    answer = ""
    for line in lines(block):
        if line.endswith("|"):
            answer = line.removesuffix("|").strip()
            continue
        facts += [Fact(relation, subject, subject, answer) for subject, _ in pairs(line)]
    return tuple(facts)


def with_article(noun: str) -> str:
    """`an owl`, `a lion`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
