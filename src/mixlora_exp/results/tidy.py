"""All scores and all paired differences as tidy data: one figure a line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import stdev
from typing import Any

from mixlora_exp.results.data_facts import groups
from mixlora_exp.results.paper import TASK_TITLES
from mixlora_exp.results.runs import LIKELIHOOD, RecordedRun, read_margins
from mixlora_exp.results.statistics.two_classes import area_error
from mixlora_exp.results.tables.parts import AVERAGE_ABOVE, Table

SCORES = (
    "model", "method", "rank", "alpha", "rate", "mix", "seed", "task", "protocol", "metric",
    "value", "se", "n", "rows", "record",
)  # fmt: skip
DIFFERENCES = (
    "table", "conditions", "a", "b", "task", "metric", "delta", "low", "high", "p", "q", "n",
    "seeds", "at_chance", "mark",
)  # fmt: skip
TASK_IDS = {title: name for name, title in TASK_TITLES.items()}
TASK_IDS[AVERAGE_ABOVE] = "average above chance"
METRICS = ("accuracy", "accuracy_normalized", LIKELIHOOD)
AREA = "area_under_roc_curve"
"""Of tasks with two answers: 0.5 for any constant answer."""


def _text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _scores(run: RecordedRun) -> Iterator[Sequence[Any]]:
    method, trainer = run.trained["method"], run.trained["trainer"]
    trained = run.method != "none"
    settings = [method.get("rank"), method.get("alpha"), trainer["learning_rate"]]
    head = [
        run.model, run.method, *(settings if trained else ["", "", ""]), "+".join(run.mix),
        run.seed if trained else "",
    ]  # fmt: skip
    for (task, protocol), score in run.scores.items():
        found: dict[str, tuple[float, float | None]] = {}
        for metric in METRICS:
            value = score.get(metric)
            if value is None:
                continue
            error = math.sqrt(value * (1 - value) / score["n"]) if metric != LIKELIHOOD else None
            if error is None:
                rows = run.predictions[task, protocol].values()
                nats = [row[LIKELIHOOD] for row in rows if row.get(LIKELIHOOD) is not None]
                error = stdev(nats) / math.sqrt(len(nats)) if nats[1:] else None
            found[metric] = value, error
        margins = read_margins(run, task, protocol)
        if margins is not None and len({first for _, first in margins.values()}) == 2:
            found[AREA] = area_error(margins, groups(run, task, protocol))
        rows_ = "held out" if run.held_out else "test"
        for metric, figures in found.items():
            shown = map(_number, figures)
            yield [*head, task, protocol, metric, *shown, score["n"], rows_, run.name]


def scores_csv(runs: Sequence[RecordedRun]) -> str:
    """Return every score of every usable run. `value`: accuracies and areas under the ROC curve
    as fractions, log-likelihoods in nats; `se`: its standard error over items, taken as independent
    but for the areas; `rows`: the test set, or rows held out of training."""
    return _text(SCORES, (line for run in runs for line in _scores(run)))


def differences_csv(tables: Mapping[int, Table]) -> str:
    """Return every paired difference of every table. `delta`, `low`, `high`: percentage points, or
    nats; `p`: two-sided, not corrected; `q`: by Holm over the table (Table 12: by its own rule),
    where there are several seeds and the cells are not at chance. Without bounds: zero in every
    item and seed."""
    return _text(DIFFERENCES, (line for table in tables.values() for line in _differences(table)))


def _differences(table: Table) -> Iterator[Sequence[Any]]:
    for block in table.blocks:
        for row in block.rows:
            a, b = _sides(row.label)
            for column, cell in zip(block.columns, row.cells, strict=True):
                if cell.kind != "versus":
                    continue
                numbers = [cell.value, cell.low, cell.high, cell.p, cell.q]
                metric = LIKELIHOOD if cell.nats else block.metric
                task = TASK_IDS.get(column, column)
                yield [
                    table.number, block.words or block.heading, a, b, task, metric,
                    *map(_number, numbers), cell.items, cell.seeds,
                    "yes" if cell.at_chance else "no", cell.mark,
                ]  # fmt: skip


def _sides(label: Sequence[str]) -> tuple[str, str]:
    """Return the two sides of a line "A minus B"."""
    if len(label) == 3 and " minus " in label[1]:
        first, _, second = label[1].partition(" minus ")
        return f"{label[0]}, {first}", f"{label[0]}, {second}"
    _, _, other = label[-1].partition("minus ")
    setup = f", {label[1]}" if len(label) == 3 else ""
    return label[0] + setup, other if other == "the base model" else other + setup
