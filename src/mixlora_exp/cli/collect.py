"""Pack finished runs into runs/ of a root of results (results=DIR).

Packs the record and the predictions of every finished run of committed code into one file,
DIR/runs/NAME.zip; weights stay where they are. A run that was collected before is skipped, and
so are runs on random weights; a different run of the same name, and a damaged one, is refused (exit
code 2). --source=DIR/runs packs unpacked folders there, and removes what it has packed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.results.collect import Collected, collect
from mixlora_exp.system.exit_codes import MISTAKE

OUTPUTS = Path("outputs")
"""Default folder of runs."""


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--source", metavar="DIR", type=Path, help=f"default: {OUTPUTS}")
    parser.add_results()
    forced = "also collect runs of other code and of random weights; tables mark them"
    parser.add_argument("--force", action="store_true", help=forced)
    args = parser.parse(argv)
    found = Collected()
    # A fresh clone has no default folder; a folder given as --source must exist.
    if args.source is not None or OUTPUTS.is_dir():
        found = collect(args.source or OUTPUTS, args.results / "runs", force=args.force)
    for name in found.packed:
        print(f"collected: {name}")
    for entry in found.refused:
        print(f"refused: {entry.name}: {entry.reason}", file=sys.stderr)
    if found.random:
        print(f"skipped: {found.random} on random weights, whose scores mean nothing")
    if found == Collected():
        print(f"nothing to collect: no finished run in {args.source or OUTPUTS}")
    else:
        print(
            f"{len(found.packed)} collected, {found.known} already there, "
            f"{len(found.refused)} refused"
        )
    return MISTAKE if found.refused else 0
