"""Table 11: stability of training by setting; not a table of the paper."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any

from mixlora_exp.config.resolve import EXCLUDED
from mixlora_exp.records.spikes import spikes
from mixlora_exp.results.headings import short_hash, told_apart, word
from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES, TASK_TITLES
from mixlora_exp.results.runs import RecordedRun, circumstances
from mixlora_exp.results.tables.parts import Block, Entry, Row, number
from mixlora_exp.results.tables.registry import Made, Sources, table

FACTORS = (
    "trainer.loss_on", "trainer.padding_in_loss", "trainer.learning_rate", "trainer.schedule",
    "trainer.warmup_steps", "trainer.max_grad_norm", "method.router_loss_coef",
    "method.router_precision",
)  # fmt: skip
"""The varied settings; all other training settings must be equal within a block."""
COLUMNS = (
    "first loss", "last loss", "gradient norm, median", "largest", "at step", "gradient spikes",
    "loss spikes", "steps", "seeds",
)  # fmt: skip
ENDS = 10
"""Number of steps over which first and last loss are averaged."""

Values = tuple[tuple[str, Any], ...]


def _factors(run: RecordedRun) -> Values:
    pairs = (dotted.split(".") for dotted in FACTORS)
    return tuple((f"{g}.{n}", run.trained[g][n]) for g, n in pairs if n in run.trained[g])


def _rest(run: RecordedRun) -> dict[str, Any]:
    """Return settings that must be equal within a block, by name."""
    left = {"trainer.name", *EXCLUDED, *FACTORS}
    groups = ("trainer", "method", "data")
    found = {f"{g}.{n}": v for g in groups for n, v in run.trained[g].items()}
    return {
        **{name: value for name, value in found.items() if name not in left},
        **circumstances(run.record),
        "trainer.micro_batch_size": run.micro_batch_size,
        "model": run.model,
        "tasks": sorted(run.mix),
        "examples": run.record["train"]["examples"],
        "rows": short_hash(run.hashes(run.mix[0])[1:]),
    }


def _cells(runs: Sequence[RecordedRun]) -> tuple[Entry, ...]:
    names = tuple(run.name for run in runs)
    found = [run.record["train"]["stability"] for run in runs]
    losses = [entry["step_losses"] for entry in found]
    # Spikes are recounted: records before 2026-11-22 omitted the first twenty steps.
    worst = max(found, key=lambda entry: entry["gradient_norm_max"])
    figures = (
        (mean(mean(row[:ENDS]) for row in losses), 2),
        (mean(mean(row[-ENDS:]) for row in losses), 2),
        (mean(entry["gradient_norm_median"] for entry in found), 2),
        (worst["gradient_norm_max"], 2),
        (worst["gradient_norm_max_step"], 0),
        (sum(len(spikes(entry["step_gradient_norms"])) for entry in found), 0),
        (sum(len(spikes(entry["step_losses"])) for entry in found), 0),
        (mean(len(row) for row in losses), 0),
        (len(runs), 0),
    )
    return tuple(number(value, digits, names) for value, digits in figures)


def _label(values: Values, base: Values) -> str:
    odd = [f"{n}={word(v)}" for (n, v), (_, own) in zip(values, base, strict=True) if v != own]
    return ", ".join(odd) or "as trained by default"


@table(11, "Stability of training")
def stability(sources: Sources) -> Made:
    """Return Table 11: one block per group of runs that differ only in `FACTORS`. Groups without a
    run with the default values are left out."""
    defaults = {name: config for name, config in sources.composed().items() if name != "none"}
    groups: dict[str, dict[Values, dict[int, RecordedRun]]] = defaultdict(lambda: defaultdict(dict))
    for run in sorted(sources.runs, key=lambda run: run.name):
        if run.method not in defaults or run.rescored:
            continue
        if run.record["train"].get("stability"):
            # Runs that differ only in scoring have identical training: only one counts.
            rest = json.dumps(_rest(run), sort_keys=True)
            groups[rest][_factors(run)].setdefault(run.seed, run)
    blocks, rests = [], []
    for rest, variants in sorted(groups.items()):
        first = next(iter(next(iter(variants.values())).values()))
        pairs = (dotted.split(".") for dotted in FACTORS)
        config = defaults[first.method]
        base = tuple((f"{g}.{n}", config[g][n]) for g, n in pairs if n in config[g])
        if base not in variants or len(variants) == 1:
            continue
        order = sorted(variants, key=lambda values: (values != base, _label(values, base)))
        rows = [
            Row((_label(values, base),), _cells([*variants[values].values()])) for values in order
        ]
        mix = ", ".join(TASK_TITLES[task] for task in TASK_TITLES if task in first.mix)
        heading = (
            f"{MODEL_TITLES.get(first.model, first.model)}, {METHOD_TITLES[first.method]} trained "
            f"on {mix}: {first.record['train']['examples']:,} examples, {first.record['dtype']}"
        )
        blocks.append(Block(heading, ("settings",), COLUMNS, tuple(rows), run=True))
        rests.append(json.loads(rest))
    headings = told_apart([block.heading for block in blocks], rests)
    blocks = [dataclasses.replace(b, heading=h) for b, h in zip(blocks, headings, strict=True)]
    notes = [
        "Not a table of the paper. Losses are means over the first and the last ten optimizer "
        "steps (of losses on other tokens, they are other quantities); gradient norms are of the "
        "whole gradient before clipping. A spike is a step whose value is more than one and a half "
        "times the largest of the twenty steps before it (in the beginning of as many as there "
        "are, if they are four); spikes are summed over the seeds.",
    ]
    return blocks, notes
