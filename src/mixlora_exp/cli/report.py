"""Build the report from collected runs (results=DIR).

One static page, DIR/report/index.html, with tables, figures and a link from each number to
its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.results.build import gather, write_report


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code."""
    parser = Parser(__doc__)
    parser.add_results()
    parser.add_argument("--output", metavar="DIR", type=Path, help="write elsewhere")
    args = parser.parse(argv)
    found = gather(parser.require_results(args.results))
    print(f"written: {write_report(found, args.output or args.results)}")
    return 0
