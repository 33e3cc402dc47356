"""Generate text with an adapter: `python generate.py adapter=DIR 'prompt=Question: ...'`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mixlora_exp.cli.hydra_command import parse_flags, show, shows
from mixlora_exp.config.command import compose, parse_overrides
from mixlora_exp.config.given_paths import check_folders
from mixlora_exp.config.typed import TEXTS, as_typed, literal, typed_texts
from mixlora_exp.errors import UserError
from mixlora_exp.serving.prompts import check_text

BASE = ("model", "kernel", "seed", "trainer", "base")
"""Fields that choose the base model and how it is loaded."""
ASKED = (*TEXTS, "adapter", "adapters")


def _checked(word: str) -> str:
    """Return the argument, with the folders of a list as they were typed."""
    name, _, value = word.partition("=")
    if name in ASKED:
        check_text(word, name)
    if name == "adapters" and value.startswith("["):
        return f"{name}={literal([text for text in typed_texts(value) if text])}"
    return word


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: the command line is not valid, or an adapter cannot be used.
    """
    argv = as_typed([_checked(word) for word in argv or ["--help"]])
    args = parse_flags(argv)
    overrides = list(args.overrides)
    if shows(args):
        return show(argv, args, "generate", overrides)
    if args.multirun:
        raise UserError(
            "-m is not supported by generate.py: give adapters=[DIR,DIR] to use several adapters"
        )
    settings = compose(overrides, "generate")
    given = parse_overrides(overrides)
    named = {one.key_or_group.partition(".")[0] for one in given}
    if not named & {*ASKED, "model"} and sys.stdin.isatty():
        raise UserError(
            "no prompt was given: give 'prompt=...' or prompts=FILE; to type prompts, name the "
            "model that answers them (adapter=DIR, or model=NAME)"
        )
    words = [one.input_line or "" for one in given if one.key_or_group.partition(".")[0] in BASE]
    folders = [("adapter", settings.adapter), ("model.path", settings.model.path)]
    check_folders([*folders, *(("adapter", folder) for folder in settings.adapters)])
    # Imported late, so that a mistake on the command line is reported before torch loads.
    from mixlora_exp.serving.answer import answer

    answer(settings, words)
    return 0
