"""The one exception that stands for a mistake of the user's, not of the program's."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """A request that cannot be carried out, told in one message.

    The message names the field, its value and the way out. `mixlora_exp.cli` prints it without
    a traceback and exits with code 2.
    """
