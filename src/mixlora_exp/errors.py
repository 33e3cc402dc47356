"""Mistakes of the user, told in one message and never as a traceback."""

from __future__ import annotations

import unicodedata

__all__ = ["PackError", "UserError", "shown"]

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

    The message names the field, its value and the way out. The command line prints it without a
    traceback and exits with code 2. Whatever values from files stand in it, it is one line, no
    longer than a screen, without characters that a terminal would act on.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(str(message)))


class PackError(UserError):
    """Runs of a pack failed; the others are recorded, or another process's."""

    def __init__(self, message: str, *, done: int, failed: int) -> None:
        super().__init__(message)
        self.done, self.failed = done, failed
