"""The smallest difference that a comparison of two methods would see in four out of five tries.

`python scripts/power.py a=RUN b=RUN tasks=arc_e,obqa seeds=3 changed=0.03` takes from two records
under results/runs/ how often just one of two methods is right (length-normalised, answers as
text), and foretells full test sets. `changed`: share of items that two seeds of one method answer
differently. `factor=3` takes both shares three times.
"""

from __future__ import annotations

import sys

from mixlora_exp.config.places import RESULTS
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import PACKED
from mixlora_exp.results.power import average_item_error, seed_spread, smallest_detectable
from mixlora_exp.results.runs import RecordedRun, check_run, read_rows
from mixlora_exp.system.guarded import guarded
from mixlora_exp.tasks import TASKS

RUNS = RESULTS / "runs"
DEFAULTS = {"a": "", "b": "", "tasks": "", "seeds": "3", "changed": "0.03", "factor": "1"}


def _right(run: RecordedRun, task: str) -> dict[str, bool]:
    rows = read_rows(run, task, "answer_text")
    return {key: row["prediction_normalized"] == row["answer"] for key, row in rows.items()}


def _discordant(a: RecordedRun, b: RecordedRun, task: str) -> float:
    first, second = _right(a, task), _right(b, task)
    if first.keys() != second.keys():
        raise UserError(f"{a.name} and {b.name} were scored on different items of {task}")
    return sum(first[key] != second[key] for key in first) / len(first)


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print((__doc__ or "").strip())
        return 0
    options = dict(DEFAULTS)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in DEFAULTS:
            raise UserError(f"{argument!r}: write name=value with one of {', '.join(DEFAULTS)}")
        options[name] = value
    try:
        seeds = int(options["seeds"])
        changed, factor = float(options["changed"]), float(options["factor"])
    except ValueError as error:
        raise UserError(f"seeds, changed and factor are numbers: {error}") from error
    a, b = (check_run(RUNS / f"{options[side]}{PACKED}") for side in "ab")
    tasks = [task for task in options["tasks"].split(",") if task] or sorted(
        {task for task, protocol in a.scores.keys() & b.scores.keys() if protocol == "answer_text"}
    )
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"tasks={unknown[0]} is unknown: choose from {', '.join(TASKS)}")
    items = {task: TASKS[task].sizes["test"] for task in tasks}
    shares = {task: factor * _discordant(a, b, task) for task in tasks}
    for task in tasks:
        print(f"{task:12}{items[task]:6,} items, {100 * shares[task]:.1f} % right in one run alone")
    error, spread = average_item_error(shares, items), seed_spread(factor * changed, items)
    print(
        f"standard error over items {100 * error:.2f} points, from seed to seed {100 * spread:.2f}"
    )
    found = smallest_detectable(error, spread, seeds)
    print(f"seen in 80 % of tries with {seeds} seeds: a difference of {100 * found:.2f} points")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
