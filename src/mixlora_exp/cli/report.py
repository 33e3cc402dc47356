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
        "--short", metavar="FILE", type=Path, help="write only the page without figures and details"
    )
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        type=Path,
        help="draw only the figures of the first screen, as SVG, to DIR",
    )
    args = parser.parse(argv)
    found = gather(parser.require_results(args.results))
    if args.short is not None:
        write_text(args.short, page_text(found, args.short))
        print(f"written: {args.short}")
    if args.pictures is not None:
        print(f"drawn: {', '.join(draw_pictures(found, args.pictures)) or 'nothing'}")
    if args.short is None and args.pictures is None:
        print(f"written: {write_report(found, args.output or args.results)}")
    return 0
