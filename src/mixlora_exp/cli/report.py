"""Build the report from collected runs (results=DIR).

One static page, DIR/report/index.html, with tables, figures and a link from each number to
its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.records.record import write_text
from mixlora_exp.results.build import draw_pictures, gather, page_text, write_report


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code."""
    parser = Parser(__doc__)
    parser.add_results()
    parser.add_argument("--output", metavar="DIR", type=Path, help="write elsewhere")
    parser.add_argument(
        "--short",
        metavar="FILE",
        type=Path,
        help="write only the page without details, and its two figures to pictures/ beside it",
    )
    args = parser.parse(argv)
    found = gather(parser.require_results(args.results))
    if args.short is not None:
        write_text(args.short, page_text(found, args.short))
        names = draw_pictures(found, args.short.parent / "pictures")
        print(f"written: {args.short}, pictures: {', '.join(names) or 'none'}")
    else:
        print(f"written: {write_report(found, args.output or args.results)}")
    return 0
