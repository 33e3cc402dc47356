"""The table at the end of a sweep: what varies, scores, time and folder of each finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import log
from pathlib import Path
from shlex import quote
from statistics import mean
from typing import Any

from mixlora_exp.config.command import Cell
from mixlora_exp.config.resolve import fingerprint
from mixlora_exp.errors import UserError, shown
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.layout import Column, Sheet, fitted
from mixlora_exp.records.record import read_run
from mixlora_exp.sweeps.jobs import duration
from mixlora_exp.system.console import console, echo

RATE = "trainer.learning_rate"


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run of a sweep. `varied`: its values of the overrides that vary, as typed;
    `scores`: accuracies by "task, protocol", in the order of the record."""

    varied: Mapping[str, str]
    record: Mapping[str, Any]
    folder: Path

    @property
    def scores(self) -> dict[str, float]:
        """Accuracies as fractions by "task, protocol", in the order of the record."""
        return {f"{s['task']}, {s['protocol']}": s["accuracy"] for s in self.record["scores"]}


def varied(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Return for each cell its values of the overrides that are not the same in all cells."""
    given = [dict(o.lstrip("+").partition("=")[::2] for o in cell.overrides) for cell in cells]
    keys = dict.fromkeys(key for own in given for key in own)
    odd = [key for key in keys if len({own.get(key) for own in given}) > 1]
    return [{key: own[key] for key in odd if key in own} for own in given]


def finished(cells: Sequence[Cell]) -> list[Finished]:
    """Return the finished runs of the cells, the best by the first metric first."""
    # Imported late: it loads torch.
    from mixlora_exp.runs.inputs import resolve_config

    found = []
    for cell, own in zip(cells, varied(cells), strict=True):
        with suppress(UserError):
            config = resolve_config(cell.config)
            folder = Path(config.output_dir).expanduser()
            # The name of a run that scores an adapter begins with that adapter's method.
            for path in folder.glob(f"*-s{config.seed}-{fingerprint(config)[:10]}/{RECORD}"):
                found.append(Finished(own, read_run(path), path.parent))
    first = next((name for run in found for name in run.scores), "")
    return sorted(found, key=lambda run: -run.scores.get(first, -1.0))


def _average(run: Finished, names: Sequence[str]) -> str:
    known = [run.scores[name] for name in names if name in run.scores]
    return f"{100 * mean(known):.1f}" if len(known) == len(names) else "-"


def best_settings(runs: Sequence[Finished]) -> str | None:
    """Return the command that compares the two best settings, by the mean of the first metric, with
    all seeds of each; None if there is but one setting."""
    first = next((name for run in runs for name in run.scores), "")
    settings: dict[tuple[tuple[str, str], ...], list[Finished]] = {}
    for run in runs:
        own = tuple((name, value) for name, value in run.varied.items() if name != "seed")
        settings.setdefault(own, []).append(run)
    if len(settings) < 2:
        return None
    ranked = sorted(
        settings.values(), key=lambda own: -mean(run.scores.get(first, -1.0) for run in own)
    )
    folders = (quote(str(run.folder)) for own in ranked[:2] for run in own)
    return f"Compare the two best settings: mixlora-exp compare {' '.join(folders)}"


def summary(runs: Sequence[Finished]) -> Sheet:
    """Return the table, one line a run, numbered from the best."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.scores))
    labels = [
        f"{number}  " + " ".join(f"{key}={value}" for key, value in run.varied.items())
        for number, run in enumerate(runs, start=1)
    ]
    columns = [
        Column(
            shown(name, 60).replace(", ", "\n"),
            [f"{100 * run.scores[name]:.1f}" if name in run.scores else "-" for run in runs],
        )
        for name in metrics
    ]
    # A mean over protocols, which ask the same question in other ways, would say nothing.
    by_protocol: dict[str, list[str]] = {}
    for name in metrics:
        by_protocol.setdefault(name.rpartition(", ")[2], []).append(name)
    for protocol, names in by_protocol.items():
        if len(names) > 1:
            head = shown(f"average, {protocol}", 60).replace(", ", "\n")
            columns.append(Column(head, [_average(run, names) for run in runs]))
    columns.append(Column("time", [duration(run.record.get("seconds", 0.0)) for run in runs]))
    heading = f"== Results of the sweep, accuracy in %, sorted by {metrics[0]}"
    return Sheet(shown(heading), Column("run", [shown(label, 200) for label in labels]), columns)


def edge_of_grid(runs: Sequence[Finished]) -> str | None:
    """Return a warning if the best run has the smallest or largest of several learning rates."""
    rates = {}
    for run in runs:
        with suppress(ValueError):
            rates.setdefault(float(run.varied.get(RATE, "")), run.varied[RATE])
    if len(rates) < 2 or RATE not in runs[0].varied:
        return None
    best = float(runs[0].varied[RATE])
    for end, word in ((min(rates), "smallest"), (max(rates), "largest")):
        if best == end:
            return (
                f"warning: the best run has the {word} learning rate of the sweep "
                f"({RATE}={rates[end]}): try {word.replace('est', 'er')} ones"
            )
    return None


def edge_of_range(value: float, low: float, high: float) -> str | None:
    """Return a warning if the learning rate of a search's best trial is in the lowest or highest
    tenth of its range, on a logarithmic scale."""
    place = log(value / low) / log(high / low)
    if 0.1 < place < 0.9:
        return None
    end, word, limit = ("lower", "smaller", "rate_low") if place < 0.5 else (
        "upper", "larger", "rate_high"
    )  # fmt: skip
    return (
        f"warning: the best trial has a learning rate at the {end} end of the search's range "
        f"({RATE}={value:.3g} of {low:g} to {high:g}): try {word} ones ({limit})"
    )


def print_summary(cells: Sequence[Cell]) -> None:
    """Print the table of a sweep, the folder of each run, and a warning; nothing without a finished
    run."""
    runs = finished(cells)
    if not runs:
        return
    sheet = summary(runs)
    echo(sheet.title)
    for table in fitted(sheet, console.width):
        console.print(table)
    for number, run in enumerate(runs, start=1):
        echo(f"{number}  {run.folder}")
    if (hint := best_settings(runs)) is not None:
        echo(hint)
    if (warning := edge_of_grid(runs)) is not None:
        echo(warning)
