"""Merge a LoRA or DoRA adapter into its base model: `merge_adapter.py adapter=DIR output=DIR`.

Writes a plain checkpoint in the transformers format, with the tokenizer. The base model is that of
the adapter's record, or `model=NAME`; `trainer.precision=float32` merges in full precision. Before
the folder appears, it is read back and compared with the adapter. Memory: one copy of the model
(and of its vocabulary matrix, where an adapter on it ends a tie). MixLoRA and MixDoRA cannot be
merged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.config import options
from mixlora_exp.errors import UserError
from mixlora_exp.serving.merge import write_merged
from mixlora_exp.serving.open import GROUPS, open_adapter, split_words
from mixlora_exp.system.guarded import guarded


@dataclass(slots=True, kw_only=True)
class Settings:
    adapter: str | None = None
    output: str | None = None


def run(arguments: Sequence[str]) -> None:
    words, rest = split_words(arguments)
    settings = options(Settings, rest, also=GROUPS)
    if settings.adapter is None or settings.output is None:
        raise UserError("adapter=DIR and output=DIR are needed")
    target = Path(settings.output).expanduser()
    if target.exists():
        raise UserError(f"output={target} exists already: name another folder, or remove it")
    write_merged(open_adapter(settings.adapter, words), target)
    print(f"written: {target}")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:], resumes=False))
