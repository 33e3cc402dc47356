"""What is said on the terminal while a command works."""

from __future__ import annotations

from rich.console import Console

from mixlora_exp.errors import shown

__all__ = ["be_quiet", "console", "say"]


console = Console(soft_wrap=True, highlight=False)


def be_quiet(quiet: bool) -> None:
    """Say nothing from now on, or speak again: of several processes one speaks."""
    console.quiet = quiet


def say(message: str) -> None:
    """One line of progress."""
    console.print(shown(message), markup=False)
