"""`mixlora-exp COMMAND ...`: the commands, each in a module of this folder, imported when asked."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from mixlora_exp import __version__

COMMANDS = {
    "train": "train adapters and score them, one run or a sweep",
    "evaluate": "score an adapter that exists, or the base model alone",
    "generate": "let a model with an adapter write",
    "merge": "merge a LoRA or DoRA adapter into its base model",
    "convert": "convert an adapter of the official packages to PEFT's format",
    "search": "search router-loss coefficient and learning rate",
    "status": "what has been run of every table, and what is left",
    "collect": "bring finished runs into results/runs/",
    "show": "print the record of a run",
    "tables": "make the tables from the records",
    "figures": "draw the figures from the records",
    "report": "make the report from the records",
    "power": "the smallest difference that two methods' comparison would see",
}
GO_ON = ("train", "evaluate", "search")
"""Commands that, asked to end, resume when they are started again."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["mixlora-exp COMMAND ...   (mixlora-exp COMMAND --help shows its options)", "", *lines, ""]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command line; returns the exit code (see `system.guarded`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"mixlora-exp {__version__}\n")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        sys.stderr.write(f"error: {command} is no command; {hint}\n")
        return 2
    try:
        # Late: each command loads what it needs alone.
        from mixlora_exp.system.guarded import guarded

        module = importlib.import_module(f"mixlora_exp.cli.{command}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mixlora_exp"):
            raise
        sys.stderr.write(
            f"error: {command} needs the package {error.name}: pip install 'mixlora-exp[harness]'\n"
        )
        return 2
    try:
        return guarded(module.run, rest, resumes=command in GO_ON)
    except BrokenPipeError:
        # Who reads has seen enough (`| head`). Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
