"""Merge a LoRA or DoRA adapter into its base model.

Writes a plain checkpoint in the transformers format, with the tokenizer. The base model is that of
the adapter's record, or model=NAME; trainer.precision=float32 merges in full precision. Before
the folder appears, it is read back and compared with the adapter. Memory: one copy of the model
(and of its vocabulary matrix, where an adapter on it ends a tie). MixLoRA and MixDoRA cannot be
merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Carry out one command line; returns the exit code.

    Raises:
        UserError: OUT exists, or the adapter is none or cannot be merged.
    """
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="its folder, or that of its run")
    parser.add_argument("output", metavar="OUT", help="the folder to write")
    words = "of the groups model and kernel, seed, trainer.precision and base=accept"
    parser.add_argument("overrides", metavar="NAME=VALUE", nargs="*", help=words)
    args = parser.parse(argv)
    for word in (args.adapter, args.output):
        if word.startswith(("adapter=", "output=")):
            raise UserError(f"{word}: write the two folders alone, merge ADAPTER OUT")
    target = Path(args.output).expanduser()
    if target.exists():
        raise UserError(f"{target} exists already: name another folder, or remove it")
    # Imported late, so that a mistake on the command line is told before torch is loaded.
    from mixlora_exp.serving.merge import write_merged
    from mixlora_exp.serving.open import GROUPS, open_adapter, split_words

    words, others = split_words(args.overrides)
    if others:
        raise UserError(f"{others[0]!r} is no setting of merging: there are {', '.join(GROUPS)}")
    write_merged(open_adapter(args.adapter, words), target)
    print(f"written: {target}")
    return 0
