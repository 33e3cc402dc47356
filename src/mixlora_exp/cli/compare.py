"""Compare finished runs: accuracies, paired differences with intervals, and what differs.

RUN is the folder of a finished run, a packed run, or the name of a collected one. Runs that differ
only in their seed are one side; the others are compared with the first side. Intervals are over
items and, with several seeds, over seeds; q is p corrected (Holm) for the number of comparisons.
--output writes comparison.csv, and the differences as PNG and SVG. --html writes a page that needs
no network, with learning curves, expert load and the items on which runs differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError
from mixlora_exp.records.layout import Sheet, fitted
from mixlora_exp.records.record import write_text
from mixlora_exp.results.comparison import Compared, compare_runs, read_given
from mixlora_exp.results.comparison_text import (
    as_csv,
    contrasts,
    differences_sheet,
    notes,
    scores_sheet,
    settings_sheet,
    title,
)
from mixlora_exp.system.console import console, echo

NAME = "comparison"


def _show(sheet: Sheet) -> None:
    if not sheet.labels.cells:
        return
    echo(sheet.title)
    for table in fitted(sheet, console.width):
        console.print(table)


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: a run is missing or damaged, or nothing can be compared.
    """
    parser = Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write data and plot there")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page")
    elsewhere = "for --html: the data's files, if they are elsewhere than the records say"
    parser.add_argument("--data", metavar="DIR", type=Path, help=elsewhere)
    args = parser.parse(argv)
    runs = read_given(args.runs)
    compared = compare_runs(runs)
    if len(compared.sides) < 2 and len(runs) < 2:
        raise UserError("compare needs two runs or more: name the folders of finished runs")
    for side in compared.sides:
        echo(title(side))
    for sheet in (settings_sheet, scores_sheet, differences_sheet):
        _show(sheet(compared))
    for note in notes(compared):
        echo(note)
    if args.output is not None:
        write_text(args.output / f"{NAME}.csv", as_csv(compared))
        echo(f"Written: {args.output / NAME}.csv")
        if lines := contrasts(compared):
            # Imported late: figures are an extra of the package.
            from mixlora_exp.results import figures

            figures.save(lambda: figures.forest_figure(lines), args.output, NAME)
            echo(f"Written: {args.output / NAME}.png, .svg")
    if args.html is not None:
        _write_page(compared, args.html, args.data)
    return 0


def _write_page(compared: Compared, path: Path, data: Path | None) -> None:
    # Imported late: they load torch and matplotlib.
    from mixlora_exp.results.comparison_page import comparison_page
    from mixlora_exp.results.differing_items import differing_items
    from mixlora_exp.runs.questions import scored_items

    entries, missing = differing_items(
        compared, lambda one, task: scored_items(one.record, task, data)
    )
    for reason in missing:
        echo(f"warning: the page has no questions: {reason} (--data=DIR names their folder)")
    write_text(path, comparison_page(compared, entries, missing))
    echo(f"Written: {path}")
