"""Show which runs of each table are done and which remain.

--experiment=table2 shows one sweep, --state=failed one state, --brief only how many runs of each
sweep are finished and how many are not, within seconds: it watches no lock, so that a run that is
under way counts as missing. Anything else is an override of train.py
(model=gemma_2b, data=local data.path=DIR output_dir=DIR). Runs are looked for in output_dir and
among the collected ones (results=DIR).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console

from mixlora_exp.cli.parser import Parser
from mixlora_exp.config.paths import OWN_RESULTS
from mixlora_exp.config.typed import as_typed
from mixlora_exp.sweeps.status import FINISHED, LOCAL, LOOK, STATES, SWEEPS, CellState, find_cells

SHADES = {
    "done": "green", "recorded": "green", "running": "cyan", "stopped": "yellow",
    "interrupted": "yellow", "failed": "red", "refused": "red",
}  # fmt: skip


def _by_sweep(cells: list[CellState]) -> Iterator[tuple[str, list[CellState]]]:
    for name in dict.fromkeys(cell.experiment for cell in cells):
        yield name, [cell for cell in cells if cell.experiment == name]


def _counts(cells: list[CellState]) -> list[list[str]]:
    rows = [["experiment", "finished", "missing"]]
    for name, own in _by_sweep(cells):
        finished = sum(cell.state in FINISHED for cell in own)
        rows.append([name, str(finished), str(len(own) - finished)])
    return rows


def _overview(cells: list[CellState]) -> list[list[str]]:
    states = [state for state in STATES if any(cell.state == state for cell in cells)]
    rows = [["experiment", *states, "GPU hours left"]]
    for name, own in _by_sweep(cells):
        counts = Counter(cell.state for cell in own)
        left = sum(cell.hours for cell in own if cell.state not in FINISHED)
        rows.append([name, *(str(counts[state] or "-") for state in states), _hours(left)])
    return rows


def _lines(rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table, never truncated to the terminal's width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        shown = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *shown])


def _hours(hours: float) -> str:
    if hours >= 10:
        return f"{hours:,.0f}"
    return "under 0.01" if 0 < hours < 0.005 else f"{hours:.2f}"


def _print_cells(console: Console, cells: list[CellState]) -> None:
    for name, own in _by_sweep(cells):
        console.print(f"\n{name}", style="bold")
        for cell in own:
            shade = SHADES.get(cell.state, "")
            what = f"{cell.state}: {cell.detail}" if cell.detail else cell.state
            console.print(f"  {cell.overrides}: {what}", style=shade, markup=False)
            if cell.state not in FINISHED:
                takes = f"{_hours(cell.hours)} GPU hours, {cell.memory_gib:.0f} GiB"
                console.print(f"    {takes}: {cell.command}", markup=False)


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--experiment", choices=SWEEPS)
    parser.add_argument("--state", choices=STATES)
    parser.add_argument("--brief", action="store_true", help="count finished and missing runs")
    parser.add_results()
    parser.add_argument("overrides", metavar="NAME=VALUE", nargs="*")
    args = parser.parse(argv)
    names = list(SWEEPS) if args.experiment is None else [args.experiment]
    if args.results != OWN_RESULTS:
        parser.require_results(args.results)
    # A state needs the locks watched: `stopped` is told from `running` in no other way.
    watched = not args.brief or args.state is not None
    patience = LOOK if watched else 0.0
    cells = find_cells(names, as_typed(args.overrides), args.results / "runs", patience)
    if args.state is not None:
        cells = [cell for cell in cells if cell.state == args.state]
    console = Console(soft_wrap=True, highlight=False)
    if not args.brief:
        _print_cells(console, cells)
        console.print()
    for line in _lines(_counts(cells) if args.brief else _overview(cells)):
        console.print(line, markup=False)
    if hidden := sum(cell.detail == LOCAL for cell in cells):
        console.print(f"{hidden} of those missing are {LOCAL}: add it to see their records.")
    locked = 0 if watched else sum(cell.state == "stopped" for cell in cells)
    if locked:
        console.print(
            f"{locked} of those missing are locked, and whether their processes live was not "
            "watched: leave --brief out."
        )
    if not args.brief:
        console.print(
            "GPU hours and memory are estimates, at 1e14 FLOP/s in bf16 and at most "
            "data.cutoff_length tokens an example.\ndry_run=true counts the tokens of local data; "
            "free text may have more."
        )
    return 0
