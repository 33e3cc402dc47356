"""Make the tables from the committed records: `python scripts/tables.py`.

Writes Markdown, CSV and LaTeX to `results/tables/`. `check=true` writes nothing and fails with a
diff where a table is not what its records give. `runs=[NAME,NAME]` takes these runs alone and
refuses runs that must not share a cell; it needs `output=DIR`, which writes elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.config import options
from mixlora_exp.errors import UserError
from mixlora_exp.results.build import RESULTS, gather, table_files, write_files
from mixlora_exp.system.guarded import MISTAKE, guarded


@dataclass(slots=True, kw_only=True)
class TablesOptions:
    check: bool = False
    runs: list[str] | None = None
    output: str | None = None


def run(arguments: Sequence[str]) -> int:
    settings = options(TablesOptions, arguments)
    if settings.runs is not None and settings.output is None:
        raise UserError("runs=[...] makes tables of some runs alone: give output=DIR for them")
    folder = Path(settings.output) if settings.output else RESULTS / "tables"
    results = gather(names=settings.runs)
    differences = write_files(folder, table_files(results), settings.check)
    if differences:
        print("\n".join(differences))
        print("error: the tables are not those of the records: run `make tables`", file=sys.stderr)
        return MISTAKE
    for entry in results.left_out:
        print(f"left out: {entry.name}: {entry.reason}")
    verb = "are as the records give them" if settings.check else f"written to {folder}"
    print(f"{len(results.tables)} tables of {len(results.runs)} runs {verb}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
