"""Writes tokenizers so that a failing disk is an `OSError`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

_NUMBERED = re.compile(r"\(os error (\d+)\)")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files to `folder`.

    Raises:
        OSError: a file cannot be written. The tokenizers library raises a bare `Exception` with
            the system's number in its text.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        found = _NUMBERED.search(str(error)) if type(error) is Exception else None
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(folder)) from error
