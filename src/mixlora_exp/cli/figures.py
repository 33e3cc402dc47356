"""Draw the figures from collected runs (results=DIR), as PNG and SVG in DIR/figures/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.results.build import draw_figures, gather


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code."""
    parser = Parser(__doc__)
    parser.add_results()
    parser.add_argument("--output", metavar="DIR", type=Path, help="write elsewhere")
    args = parser.parse(argv)
    folder = args.output or args.results / "figures"
    for name in draw_figures(gather(parser.require_results(args.results)), folder):
        print(f"{folder / name}.png, .svg")
    return 0
