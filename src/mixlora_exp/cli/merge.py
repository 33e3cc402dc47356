"""Merge a LoRA or DoRA adapter into its base model.

Writes a plain checkpoint in the transformers format, with the tokenizer. The base model is the one
in the adapter's record, or model=NAME; trainer.precision=float32 merges in full precision. The
folder appears only after the merged model was read back and compared with the adapter. Memory: one
copy of the model (and of its vocabulary matrix, if an adapter on it unties it). MixLoRA and MixDoRA
cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.config.typed import as_typed
from mixlora_exp.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: OUT exists, or ADAPTER is not an adapter or cannot be merged.
    """
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter or of its run")
    parser.add_argument("output", metavar="OUT", help="the folder to write")
    words = "of the groups model and kernel, seed, trainer.precision and base=accept"
    parser.add_argument("overrides", metavar="NAME=VALUE", nargs="*", help=words)
    args = parser.parse(argv)
    for word in (args.adapter, args.output):
        if word.startswith(("adapter=", "output=")):
            raise UserError(f"{word} is not valid: write the folders alone, merge ADAPTER OUT")
    target = Path(args.output).expanduser()
    if target.exists():
        raise UserError(f"{target} already exists: name another folder, or remove it")
    # Imported late, so that a mistake on the command line is reported before torch loads.
    from mixlora_exp.serving.merge import write_merged
    from mixlora_exp.serving.open import GROUPS, open_adapter, split_words

    words, others = split_words(as_typed(args.overrides))
    if others:
        raise UserError(f"{others[0]!r} is not a setting of merge: choose from {', '.join(GROUPS)}")
    write_merged(open_adapter(args.adapter, words, to_merge=True), target)
    print(f"written: {target}")
    return 0
