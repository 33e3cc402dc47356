"""Mistakes of the user, told in one message and never as a traceback."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Callable, Sequence

from mixlora_exp.interruption import REQUEUE, Terminated, install

__all__ = ["INTERRUPTED", "MISTAKE", "REQUEUE", "PackError", "UserError", "guarded", "shown"]

MISTAKE, INTERRUPTED, TERMINATED = 2, 130, 143
"""Exit codes."""
SCREEN = 1900
"""Characters of a message at most: what a terminal of 24 lines and 80 columns shows."""
ODD = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode's categories of what is no letter, mark or blank: control and format characters (escapes,
changes of writing direction, characters without width), halves of characters, other line ends."""


def shown(text: str, most: int | None = SCREEN, *, keep: str = "") -> str:
    """A text from a file, fit for a terminal and for a line: what a terminal would act on, or an
    eye would not see, stands there as an escape (`\\x1b`), and beyond `most` characters the middle
    is left out (None: nothing is). `keep`: characters that stay as they are. What was shown before
    stays as it is.
    """
    text = _cut(text, most)
    if not text.isascii() or not text.isprintable():
        text = "".join(
            letter.encode("unicode_escape").decode("ascii")
            if letter not in keep and unicodedata.category(letter) in ODD
            else letter
            for letter in text
        )
    return _cut(text, most)


def _cut(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    # What begins a message names the place, what ends it the way out.
    end = most // 3
    return f"{text[: most - end - 5]} ... {text[-end:]}"


class UserError(Exception):
    """A request that cannot be carried out, told in one message.

    The message names the field, its value and the way out. `mixlora_exp.cli` prints it without
    a traceback and exits with code 2. Whatever values from files stand in it, it is one line, no
    longer than a screen, without characters that a terminal would act on.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(str(message)))


class PackError(UserError):
    """Runs of a pack failed; the others are recorded, or another process's."""

    def __init__(self, message: str, *, done: int, failed: int) -> None:
        super().__init__(message)
        self.done, self.failed = done, failed


def guarded(
    command: Callable[[Sequence[str]], int | None], argv: Sequence[str], *, resumes: bool = True
) -> int:
    """Run a command line and return its exit code.

    0: done; 2: a mistake of the user's, told in one message; 75: asked to end by SIGTERM, and will
    go on when started again (143: it `resumes` nothing); 130: interrupted; else what `command`
    returned. A crash is raised, for Python to print it and exit with 1.
    """
    install()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: what the terminal's encoding lacks is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command(argv) or 0
    except Terminated:
        if not resumes:
            sys.stderr.write("terminated\n")
            return TERMINATED
        sys.stderr.write("terminated: what was done is kept, the same command goes on from there\n")
        return REQUEUE
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        # As Python does with a text: it is shown, and the exit code is 1.
        sys.stderr.write(f"{error.code}\n")
        return 1
