"""The command line of a run, from which a plan makes the commands that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixlora_exp.config.together import entry_overrides


def name_of(word: str) -> str:
    """Return the name of the field or group that an override sets."""
    return word.partition("=")[0].lstrip("+~")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """The command line of a run. words: the overrides that the user gave. fixed: the fields that
    entries of `adapters` set, which no other override changes."""

    script: str = "train.py"
    words: Sequence[str] = ()
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How a command's overrides differ from those that Hydra composes. own: words that it reads
    itself, such as `run=DIR`. added: names of those that it writes itself."""

    script: str = "train.py"
    own: tuple[str, ...] = ()
    added: frozenset[str] = frozenset()

    def line(self, composed: Sequence[str], entries: Sequence[Any] = ()) -> CommandLine:
        """Return the command line of a job with these composed overrides and entries of
        `adapters`."""
        given = [word for word in composed if name_of(word) not in self.added]
        fixed = {
            name_of(word)
            for number, entry in enumerate(entries, start=1)
            for word in entry_overrides(entry, number)
        }
        return CommandLine(script=self.script, words=(*self.own, *given), fixed=frozenset(fixed))


def command_of(script: str, typed: Sequence[str], composed: Sequence[str]) -> Command:
    """Return the command whose typed overrides became the composed ones."""
    return Command(
        script=script,
        own=tuple(word for word in typed if word not in composed),
        added=frozenset(name_of(word) for word in composed if word not in typed),
    )
