"""Shortens messages of libraries: the hub client's retries to a line, import warnings to none."""

from __future__ import annotations

import logging

TRIES = (" thrown while requesting ", "Retrying in ")
"""Parts of the client's messages about single retries, about a dozen per failure. Its other
messages are passed on: that requests were too many, say, which may take minutes."""


AT_IMPORT = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that warn whenever they are imported, of parts that this machine or this project does not
use. PEFT and transformers import the first two wherever they are installed."""


class _OneLine(logging.Filter):
    """Lets the first of those lines through, in plain words."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not any(text in record.getMessage() for text in TRIES):
            return True
        repeated, self._seen = self._seen, True
        record.msg = "the hub does not answer; trying again for up to half a minute"
        record.args = ()
        return not repeated


def shorten_notices() -> None:
    """Shorten these messages from now on; calling it again changes nothing."""
    for name in AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("huggingface_hub.utils._http")
    if not any(isinstance(one, _OneLine) for one in logger.filters):
        logger.addFilter(_OneLine())
