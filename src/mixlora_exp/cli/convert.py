"""Convert an adapter of the official packages (moe-peft, mixlora) to PEFT's format.

IN is a folder that one of them wrote; OUT, which must not exist yet, will load in PEFT and compute
what the official packages train. No code in the files is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: IN is not an adapter of the official packages or cannot be converted, or OUT
            exists.
    """
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    args = parser.parse(argv)
    if not args.source.is_dir():
        raise UserError(f"{args.source} is not a folder: give a folder with an adapter")
    if args.target.exists():
        raise UserError(f"{args.target} already exists: name another folder, or remove it")
    # Imported late: PEFT takes a second to load.
    from mixlora_exp.adapters.files import is_official
    from mixlora_exp.official.folders import read_official, write_peft
    from mixlora_exp.official.imports import import_official

    if not is_official(args.source):
        raise UserError(f"{args.source} is already in PEFT's format: there is nothing to convert")
    converted = import_official(read_official(args.source))
    write_peft(args.target, converted)
    for note in converted.notes:
        print(f"note: {note}")
    print(f"written in PEFT's format: {args.target}")
    return 0
