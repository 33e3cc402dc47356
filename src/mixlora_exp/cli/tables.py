"""Build the tables from collected runs (results=DIR).

Writes Markdown, CSV and LaTeX to DIR/tables/, and all scores and differences as tidy data to
DIR/scores.csv and DIR/differences.csv. --check writes nothing, and fails with a diff if
a table differs from its records. --runs uses only the named runs, and refuses runs that must not
share a cell; it needs --output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError
from mixlora_exp.results.build import data_files, gather, table_files, write_files
from mixlora_exp.system.exit_codes import MISTAKE


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: the options do not go together, or a folder cannot be read or written.
    """
    parser = Parser(__doc__)
    parser.add_results()
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--runs", metavar="NAME", nargs="+", help="use only these runs")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write elsewhere")
    args = parser.parse(argv)
    if args.runs is not None and args.output is None:
        raise UserError(
            "--runs needs --output=DIR: tables of some runs do not stand beside those of all"
        )
    folder = args.output or args.results / "tables"
    results = gather(parser.require_results(args.results), args.runs)
    differences = write_files(folder, table_files(results), args.check)
    differences += write_files(args.output or args.results, data_files(results), args.check)
    if differences:
        print("\n".join(differences))
        print(
            "error: the tables differ from the records: run it without --check",
            file=sys.stderr,
        )
        return MISTAKE
    for entry in results.left_out:
        print(f"left out: {entry.name}: {entry.reason}")
    verb = "match the records" if args.check else f"written to {folder}"
    print(f"{len(results.tables)} tables of {len(results.runs)} runs {verb}")
    return 0
