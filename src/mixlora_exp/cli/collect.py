"""Bring finished runs into results/runs/.

Packs record and predictions of every finished run that was made from committed code into one file,
results/runs/NAME.zip; weights stay where they are. A run that is there already is left alone, and
one that differs from it is refused. --source=results/runs packs folders that lie there unpacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.config.places import RESULTS
from mixlora_exp.results.collect import Collected, collect
from mixlora_exp.system.guarded import MISTAKE

OUTPUTS = Path("outputs")
"""Where runs are, unless output_dir or --source says otherwise."""


def run(argv: Sequence[str]) -> int:
    """Carry out one command line; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--source", metavar="DIR", type=Path, help=f"default: {OUTPUTS}")
    parser.add_argument("--target", metavar="DIR", type=Path, default=RESULTS / "runs")
    forced = "take runs of other code and of random weights too, marked: tables name them"
    parser.add_argument("--force", action="store_true", help=forced)
    args = parser.parse(argv)
    found = Collected()
    # In a fresh clone nothing has been run; a folder that was named must be there.
    if args.source is not None or OUTPUTS.is_dir():
        found = collect(args.source or OUTPUTS, args.target, force=args.force)
    for name in found.packed:
        print(f"collected: {name}")
    for entry in found.refused:
        print(f"refused: {entry.name}: {entry.reason}")
    if found == Collected():
        print(f"nothing to collect: there is no finished run in {args.source or OUTPUTS}")
    else:
        print(
            f"{len(found.packed)} collected, {found.known} there already, "
            f"{len(found.refused)} refused"
        )
    return MISTAKE if found.refused else 0
