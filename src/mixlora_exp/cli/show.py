"""Print the record of a run as JSON.

RUN is a run's folder, a packed run, or the name of a collected one. --file prints another JSONL
file of the run, one line per item, for example predictions/arc_e.answer_text.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RECORD, RunFiles, find_record
from mixlora_exp.records.record import read_record
from mixlora_exp.system.untrusted import parse_json


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: there is no such record or file.
    """
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--file", metavar="NAME", default=RECORD)
    args = parser.parse(argv)
    path = find_record(args.run)
    if args.file == RECORD:
        print(json.dumps(read_record(path), indent=2))
        return 0
    try:
        items = [parse_json(line) for line in RunFiles(path).read(args.file).splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--file={args.file} of {path} cannot be read: {error}") from error
    for item in items:
        print(json.dumps(item))
    return 0
