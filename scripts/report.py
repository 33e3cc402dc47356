"""Make the report from the committed records: `python scripts/report.py`.

One static page, `results/report/index.html`, with tables, figures and a link from each number to
its record; `output=DIR` writes elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.config import options
from mixlora_exp.results.build import RESULTS, gather, write_report
from mixlora_exp.system.guarded import guarded


@dataclass(slots=True, kw_only=True)
class ReportOptions:
    output: str | None = None


def run(arguments: Sequence[str]) -> None:
    settings = options(ReportOptions, arguments)
    folder = Path(settings.output) if settings.output else RESULTS
    print(f"written: {write_report(gather(), folder)}")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
