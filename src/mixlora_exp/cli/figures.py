"""Draw the figures from the committed records, as PNG and SVG in results/figures/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.config.paths import RESULTS
from mixlora_exp.results.build import draw_figures, gather


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--output", metavar="DIR", type=Path, default=RESULTS / "figures")
    folder = parser.parse(argv).output
    for name in draw_figures(gather(), folder):
        print(f"{folder / name}.png, .svg")
    return 0
