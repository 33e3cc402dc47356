"""Progress messages on the terminal."""

from __future__ import annotations

from rich.console import Console

from mixlora_exp.errors import shown

console = Console(soft_wrap=True, highlight=False)


def be_quiet(quiet: bool) -> None:
    """Suppress progress messages, or print them again; with several processes, only one prints."""
    console.quiet = quiet


def echo(message: str) -> None:
    """Print a line of progress."""
    console.print(shown(message), markup=False)
