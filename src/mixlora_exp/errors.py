"""User mistakes, reported in one message without a traceback."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

SCREEN = 1900
"""Maximum number of characters of a message: what a terminal of 24 lines and 80 columns shows."""
ODD = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that are escaped: control and format characters (terminal escapes, changes of
writing direction, zero-width characters), surrogates, private use, line separators."""


def shown(text: str, most: int | None = SCREEN, *, keep: str = "") -> str:
    """Return untrusted text made safe to print on one line of a terminal.

    Characters that a terminal would interpret, or that are invisible, become escapes (`\\x1b`),
    except those in `keep`. A text of more than `most` characters loses its middle (None: no limit).
    Idempotent.
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
    # A message begins with the field and ends with the way out.
    end = most // 3
    return f"{text[: most - end - 5]} ... {text[-end:]}"


def did_you_mean(
    word: str, options: Iterable[str], otherwise: str = "", *, most: int = 3, prefix: str = ""
) -> str:
    """Compute `; did you mean A or B?` with those of the options that are close to a word, at most
    so many and each with the prefix; `otherwise` if none is."""
    close = difflib.get_close_matches(word, list(options), n=most, cutoff=0.6)
    named = " or ".join(prefix + option for option in close)
    return f"; did you mean {named}?" if close else otherwise


class UserError(Exception):
    """A request that cannot be executed.

    The message names the field, its value and the way out. The command line prints it without a
    traceback and exits with code 2. Whatever values from files it contains, it is one line, no
    longer than a screen, without characters that a terminal would interpret.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(str(message)))


class NotEnoughMemory(UserError):
    """A micro-batch does not fit in the device's memory."""


class PackError(UserError):
    """Some runs of a pack (adapters trained together) failed.

    `done` and `failed` count runs. The remaining runs are recorded, or belong to another process.
    """

    def __init__(self, message: str, *, done: int, failed: int) -> None:
        super().__init__(message)
        self.done, self.failed = done, failed
