"""Print the record of a run as JSON: `python scripts/show.py run=NAME` for those in
`results/runs/`, `run=PATH` for any packed run or run's folder.

`file=predictions/arc_e.answer_text.jsonl` prints another of its files, a line for each item.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.config import options
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import PACKED, RECORD, read_file
from mixlora_exp.records.record import read_record
from mixlora_exp.results.build import RESULTS
from mixlora_exp.system.guarded import guarded
from mixlora_exp.system.untrusted import parse_json


@dataclass(slots=True, kw_only=True)
class Shown:
    run: str = ""
    file: str = RECORD


def _path(run: str) -> Path:
    given, kept = Path(run).expanduser(), RESULTS / "runs" / f"{run}{PACKED}"
    for path in (given / RECORD, given if given.suffix == PACKED else kept, kept):
        if path.is_file():
            return path
    raise UserError(f"run={run} is no run: give a name in results/runs, a packed run or a folder")


def run(arguments: Sequence[str]) -> None:
    settings = options(Shown, arguments)
    path = _path(settings.run)
    if settings.file == RECORD:
        print(json.dumps(read_record(path), indent=2))
        return
    try:
        items = [parse_json(line) for line in read_file(path, settings.file).splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"file={settings.file} of {path} cannot be read: {error}") from error
    for item in items:
        print(json.dumps(item))


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
