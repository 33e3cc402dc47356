"""The smallest difference between two methods that a comparison detects with 80 % power.

Measures on two runs (folders, packed runs, or names of collected ones) how often exactly one of the
two is right (answer_text, length-normalised), and extrapolates to the full test sets.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RunFiles, find_record
from mixlora_exp.results.power import (
    average_item_error,
    discordant_share,
    full_test_sets,
    seed_spread,
    smallest_detectable,
)
from mixlora_exp.results.runs import check_run


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: the runs have no task in common, or an option is not valid.
    """
    parser = Parser(__doc__)
    parser.add_argument("a", metavar="RUN")
    parser.add_argument("b", metavar="RUN")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    differently = "share of items that two seeds of one method answer differently"
    parser.add_argument("--changed", type=float, default=0.03, help=differently)
    parser.add_argument("--factor", type=float, default=1.0, help="multiply both shares by this")
    args = parser.parse(argv)
    a, b = (check_run(RunFiles(find_record(name))) for name in (args.a, args.b))
    tasks = args.tasks or sorted(
        {task for task, protocol in a.scores.keys() & b.scores.keys() if protocol == "answer_text"}
    )
    if not tasks:
        raise UserError(
            f"{a.name} and {b.name} have no task in common under answer_text: give two runs with "
            "evaluation.protocols=[answer_text]"
        )
    items = full_test_sets(tasks)
    shares = {task: args.factor * discordant_share(a, b, task) for task in tasks}
    for task in tasks:
        print(f"{task:12}{items[task]:6,} items, {100 * shares[task]:.1f} % right in only one run")
    error, spread = (
        average_item_error(shares, items),
        seed_spread(args.factor * args.changed, items),
    )
    print(f"standard error over items {100 * error:.2f} points, between seeds {100 * spread:.2f}")
    found = smallest_detectable(error, spread, args.seeds)
    print(f"80 % power with {args.seeds} seeds: detects a difference of {100 * found:.2f} points")
    return 0
