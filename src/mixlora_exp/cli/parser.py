"""argparse for the commands without Hydra: a mistake raises `UserError`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixlora_exp.config.paths import OWN_RESULTS
from mixlora_exp.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s. `description`: the docstring of the
    command's module, which `--help` prints unchanged."""

    def __init__(self, description: str | None, **options: Any) -> None:
        if Path(sys.argv[0]).name == "mixlora-exp" and len(sys.argv) > 1:
            options.setdefault("prog", f"mixlora-exp {sys.argv[1]}")
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            hint = did_you_mean(str(value), names, f"; choose one of {', '.join(names)}", most=1)
            name = (action.option_strings or [action.dest])[0]
            raise UserError(f"{name}={value} is unknown{hint}")

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` with argparse's message, in place of its own printing and exit."""
        raise UserError(f"{message} (--help lists the options)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse options and positional arguments in any order.

        Raises:
            UserError: an option is unknown (the message names the closest one) or given twice, its
                value is not valid, or it names a file where a folder belongs, or a folder where a
                file does.
        """
        names = [name for action in self._actions for name in action.option_strings]
        for word in argv:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("-") and name not in names:
                hint = did_you_mean(name, names, f"; choose from {', '.join(names)}", most=1)
                raise UserError(f"{word}: there is no option {name}{hint}")
        words = [w for word in argv for w in self._dashed(word)]
        options = words[: words.index("--")] if "--" in words else words
        typed = [word.partition("=")[0] for word in options if word.startswith("-")]
        # argparse would take the last and pass over the others.
        if twice := next((name for name in typed if typed.count(name) > 1), None):
            raise UserError(f"{twice} is given {typed.count(twice)} times: give it once")
        found = self.parse_intermixed_args(words)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if isinstance(value, Path) and action.option_strings:
                _check_kind(action.dest, value, str(action.metavar))
        return found

    def add_results(self) -> None:
        """Add `results=DIR`, the root of collected runs and of what is made from them."""
        what = f"root with runs/ and what is made from them (default: {OWN_RESULTS})"
        self.add_argument("--results", metavar="DIR", type=Path, default=OWN_RESULTS, help=what)

    def require_results(self, folder: Path) -> Path:
        """Return `results=DIR` if there is such a folder.

        Raises:
            UserError: there is none.
        """
        if not folder.is_dir():
            raise UserError(
                f"results={folder} does not exist: name a folder with runs/, which "
                "`mixlora-exp collect` makes"
            )
        return folder

    def _dashed(self, word: str) -> list[str]:
        """Return an option that was written as a setting (`brief=true`, `output=DIR`), with its
        dashes."""
        name, equals, value = word.partition("=")
        action = self._option_string_actions.get(f"--{name}")
        if not equals or action is None:
            return [word]
        if action.nargs != 0:
            return [f"--{word}"]
        if value not in ("true", "false"):
            raise UserError(f"{word} is not valid: expected true or false")
        return [f"--{name}"] if value == "true" else []


def _check_kind(name: str, path: Path, kind: str) -> None:
    """Refuse a file, or a path below one, where `kind` is DIR, and a folder where it is FILE.

    Raises:
        UserError: it is one.
    """
    if kind == "FILE" and path.is_dir():
        page = path / "page.html"
        raise UserError(f"{name}={path} is a folder: name the file to write, as {page}")
    there = next((place for place in (path, *path.parents) if os.path.exists(place)), None)
    if kind == "DIR" and there is not None and not there.is_dir():
        place = "is" if there == path else f"lies below {there}, which is"
        raise UserError(f"{name}={path} {place} a file: name a folder")
