"""Shortens the hub client's messages about its retries to one line."""

from __future__ import annotations

import logging

TRIES = (" thrown while requesting ", "Retrying in ")
"""Parts of the client's messages about single retries, about a dozen per failure. Its other
messages are passed on: that requests were too many, say, which may take minutes."""


class _OneLine(logging.Filter):
    """Lets the first of those lines through, in plain words."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not any(text in record.getMessage() for text in TRIES):
            return True
        told, self._told = self._told, True
        record.msg = "the hub does not answer; trying again for up to half a minute"
        record.args = ()
        return not told


def shorten() -> None:
    """Shorten these messages from now on; calling it again changes nothing."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    if not any(isinstance(one, _OneLine) for one in logger.filters):
        logger.addFilter(_OneLine())
