"""`mixlora-exp COMMAND ...`: each command is a module in this folder, imported on demand."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from mixlora_exp import __version__
from mixlora_exp.errors import did_you_mean

COMMANDS = {
    "train": "train adapters and score them, one run or a sweep",
    "evaluate": "score an existing adapter, or the base model alone",
    "generate": "generate text with an adapter",
    "lm-eval": "lm-eval's own command line, which then knows adapters with experts",
    "merge": "merge a LoRA or DoRA adapter into its base model",
    "push": "publish the adapter of a run on the Hugging Face hub",
    "convert": "convert an adapter of the official packages to PEFT's format",
    "search": "search router-loss coefficient and learning rate",
    "status": "show which runs of each table are done and which remain",
    "collect": "pack finished runs into one root of results",
    "compare": "compare finished runs: scores, paired differences, what differs",
    "show": "print the record of a run",
    "tables": "build the tables from collected runs",
    "figures": "draw the figures from collected runs",
    "report": "build the report from collected runs",
    "bench": "measure time and memory of training steps, kernels and scoring",
    "gpu-check": "try everything at the size of LLaMA-2 7B on a CUDA GPU",
    "power": "the smallest difference that a comparison of two methods detects",
}
GO_ON = ("train", "evaluate", "search")
"""Commands that resume after an interruption when they are started again."""

SLOW = ("train", "evaluate", "generate", "merge", "search", "bench")
"""Commands that load torch before they print their first line."""
EXTRAS = {"matplotlib": "figures", "jinja2": "figures", "optuna": "search", "lm_eval": "eval"}
"""Extras of the package that bring a module which is missing; else it is `harness`."""


def usage() -> str:
    """Return the text of `mixlora-exp --help`: a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["mixlora-exp COMMAND ...   (mixlora-exp COMMAND --help shows its options)", "", *lines, ""]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Execute one command line and return the exit code (see `system.exit_codes`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"mixlora-exp {__version__}\n")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS, f"; choose from {', '.join(COMMANDS)}", most=1)
        sys.stderr.write(f"error: {command} is not a command{hint}\n")
        return 2
    if command in SLOW and sys.stderr.isatty():
        # Something to read while libraries load; where a program reads, nothing.
        sys.stderr.write(f"mixlora-exp {command}: loading, some seconds\n")
    try:
        # Imported late, so that a command loads only what it needs.
        from mixlora_exp.system.exit_codes import guarded
        from mixlora_exp.system.library_notices import shorten_notices

        # Libraries warn when they are imported, which a command may do before it reads `--help`.
        shorten_notices()
        module = importlib.import_module(f"mixlora_exp.cli.{command.replace('-', '_')}")
        return guarded(module.run, rest, resumes=command in GO_ON)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "mixlora_exp":
            raise
        sys.stderr.write(
            f"error: {command} needs the package {name}: run `make install`, or "
            f"`pip install '.[{EXTRAS.get(name, 'harness')}]'`, in the folder of the code\n"
        )
        return 2
    except BrokenPipeError:
        # The reader closed the pipe (`| head`). Without this, Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
