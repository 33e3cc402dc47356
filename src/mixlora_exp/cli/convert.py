"""Convert an adapter of the official packages (moe-peft, mixlora) to PEFT's format.

IN is the folder that they wrote; OUT, which must not exist, becomes one that PEFT loads. The
logits are those of the official packages. Files are read without running anything in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Carry out one command line.

    Raises:
        UserError: IN is no adapter of the official packages or cannot be converted, or OUT exists.
    """
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    args = parser.parse(argv)
    if not args.source.is_dir():
        raise UserError(f"{args.source} is no folder: give one with an adapter")
    if args.target.exists():
        raise UserError(f"{args.target} exists already: name another folder, or remove it")
    # Late: PEFT takes a second to load.
    from mixlora_exp.adapters.files import is_official
    from mixlora_exp.official.folders import read_official, write_peft
    from mixlora_exp.official.imports import import_official

    if not is_official(args.source):
        raise UserError(f"{args.source} is in PEFT's format already: there is nothing to convert")
    converted = import_official(read_official(args.source))
    write_peft(args.target, converted)
    for note in converted.notes:
        print(f"note: {note}")
    print(f"written in PEFT's format: {args.target}")
    return 0
