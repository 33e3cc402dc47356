"""Draw the figures from the committed records: `python scripts/figures.py`.

Writes PNG and SVG to `results/figures/`; `output=DIR` writes elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.config import options
from mixlora_exp.results.build import RESULTS, draw_figures, gather
from mixlora_exp.system.guarded import guarded


@dataclass(slots=True, kw_only=True)
class FiguresOptions:
    output: str | None = None


def run(arguments: Sequence[str]) -> None:
    settings = options(FiguresOptions, arguments)
    folder = Path(settings.output) if settings.output else RESULTS / "figures"
    for name in draw_figures(gather(), folder):
        print(f"{folder / name}.png, .svg")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
