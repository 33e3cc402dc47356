"""Progress messages on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from mixlora_exp.errors import shown

console = Console(soft_wrap=True, highlight=False)


_labels: list[str] = []


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Within this context each line of progress begins with `label`, so that the lines of several
    processes on one terminal can be told apart."""
    _labels.append(label)
    try:
        yield
    finally:
        _labels.pop()


def line_label() -> str:
    """Return what each line of progress begins with; empty in a process that has the terminal
    alone."""
    return "".join(f"{label}: " for label in _labels)


def be_quiet(quiet: bool) -> None:
    """Suppress progress messages, or print them again; with several processes, only one prints."""
    console.quiet = quiet


def echo(message: str) -> None:
    """Print a line of progress."""
    console.print(f"{line_label()}{shown(message)}", markup=False)
