"""Bring finished runs into `results/runs/`: `python scripts/collect.py` (or `source=DIR`, where
they are not in outputs/).

Packs record and predictions of every finished run that was made from committed code into one file,
`results/runs/NAME.zip`; weights stay where they are. A run that is there already is left alone, and
one that differs from it is refused. `force=true` takes runs of other code and of random weights
too, marked: tables name them. `source=results/runs` packs folders that lie there unpacked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.config import options
from mixlora_exp.results.build import RESULTS
from mixlora_exp.results.collect import Collected, collect
from mixlora_exp.system.guarded import MISTAKE, guarded

OUTPUTS = Path("outputs")
"""Where runs are, unless output_dir or source says otherwise."""


@dataclass(slots=True, kw_only=True)
class CollectOptions:
    source: str | None = None
    target: str | None = None
    force: bool = False


def run(arguments: Sequence[str]) -> int:
    settings = options(CollectOptions, arguments)
    target = Path(settings.target) if settings.target else RESULTS / "runs"
    source = OUTPUTS if settings.source is None else Path(settings.source)
    found = Collected()
    # In a fresh clone nothing has been run; a folder that was named must be there.
    if settings.source is not None or source.is_dir():
        found = collect(source, target, force=settings.force)
    for name in found.packed:
        print(f"collected: {name}")
    for entry in found.refused:
        print(f"refused: {entry.name}: {entry.reason}")
    if found == Collected():
        print(f"nothing to collect: there is no finished run in {settings.source or OUTPUTS}")
    else:
        print(
            f"{len(found.packed)} collected, {found.known} there already, "
            f"{len(found.refused)} refused"
        )
    return MISTAKE if found.refused else 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
