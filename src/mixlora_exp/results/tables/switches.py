"""Table 10: effect of each switch between this project and the official packages; not in the paper.

Runs that differ only in switches are compared with runs without them, on the same items and seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.results.cells import Key, block_title
from mixlora_exp.results.condition_text import PROTOCOLS, condition_text
from mixlora_exp.results.data_facts import reference
from mixlora_exp.results.headings import short_hash, told_apart, word
from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES, TASK_TITLES
from mixlora_exp.results.runs import LIKELIHOOD, RecordedRun
from mixlora_exp.results.statistics.estimates import compare, estimate
from mixlora_exp.results.tables.lines import AREA
from mixlora_exp.results.tables.paired import ACCURACY, above, area, cell, difference
from mixlora_exp.results.tables.parts import (
    REFERENCE,
    Block,
    Entry,
    Row,
    dash,
    number,
    ours,
    versus,
)
from mixlora_exp.results.tables.registry import Made, Sources, table
from mixlora_exp.results.tables.summary import seeds_in_heading

Diff = tuple[tuple[str, Any], ...]
"""Switches that differ from `preset=correct`, with their values."""


def _values(run: RecordedRun) -> dict[str, Any]:
    """Return the switches of a run, without those that its method lacks."""
    found = {}
    for dotted in SWITCHES.values():
        group, name = dotted.split(".")
        side = run.scored if group in ("evaluation", "data") else run.trained
        if name in side[group]:
            found[dotted] = side[group][name]
    return found


def _matters(name: str, run: RecordedRun, task: str, protocol: str) -> bool:
    """Return whether a switch can affect a run's score on a task. If not, a run with the switch
    only repeats the run without it, and any difference comes from the machine."""
    if name == "evaluation.arc_labels":
        return protocol == "label_logits" and task in ("arc_e", "arc_c")
    return name != "data.boolq_passage" or "boolq" in (task, *run.mix)


def _deciding(run: RecordedRun, protocol: str) -> set[str]:
    tasks = [task for task, own in run.scores if own == protocol]
    names = SWITCHES.values()
    return {n for n in names if any(_matters(n, run, task, protocol) for task in tasks)}


def _rest(run: RecordedRun, protocol: str) -> dict[str, Any]:
    """Return all other settings that must be equal within a block, by name."""
    method = {f"method.{n}": v for n, v in run.trained["method"].items()}
    found = {**run.conditions(protocol), **method}
    return {
        **{n: v for n, v in found.items() if n not in SWITCHES.values() and n != "preset"},
        "model": run.model,
        "tasks": sorted(run.mix),
        # `group_runs` separates different data under equal conditions, but not across switches.
        "rows": short_hash([run.hashes(task) for task in sorted({t for t, _ in run.scores})]),
    }


def _diff(run: RecordedRun, protocol: str, standard: Mapping[str, Any]) -> Diff:
    deciding = _deciding(run, protocol)
    return tuple((n, v) for n, v in _values(run).items() if standard[n] != v and n in deciding)


def _standard(configs: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the switches of `preset=correct` for a method."""
    found = {}
    for dotted in SWITCHES.values():
        group, name = dotted.split(".")
        if name in configs[method][group]:
            found[dotted] = configs[method][group][name]
    return found


def _listed(values: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}={word(value)}" for name, value in values)


def _label(
    diff: Diff, own: Mapping[str, Any], presets: Mapping[str, Mapping[str, Diff]], method: str
) -> str:
    """Return the preset's name with deviations, or the list of switches, whichever is shorter."""
    if not diff:
        return "preset=correct"
    values = {**own, **dict(diff)}
    labels = [(len(diff), _listed(diff))]
    for name, by_method in presets.items():
        other = {**own, **dict(by_method[method])}
        odd = [(n, values[n]) for n in own if values[n] != other[n]]
        labels.append((len(odd), f"preset={name}" + (f", {_listed(odd)}" if odd else "")))
    return min(labels, key=lambda pair: pair[0])[1]


def _rows(
    label: str,
    diff: Diff,
    runs: Sequence[RecordedRun],
    base: Sequence[RecordedRun],
    tasks: Sequence[str],
    protocol: str,
) -> Iterator[Row]:
    names = tuple(dict.fromkeys(run.name for run in runs))
    cells = []
    for task in tasks:
        part = cell(runs, task, protocol)
        is_above = above(part, runs, task, protocol)
        cells.append(dash if part is None else ours(estimate(part), names, at_chance=not is_above))
    yield Row((label, "accuracy"), tuple(cells))
    likelihoods = [[run.scores[t, protocol]["gold_log_likelihood"] for run in runs] for t in tasks]
    if not any(value is None for row in likelihoods for value in row):
        cells = [number(mean(row), 3, names) for row in likelihoods]
        yield Row((label, LIKELIHOOD_ROW), tuple(cells))
    areas = [area(runs, task, protocol) for task in tasks]
    if any(part is not None for part in areas):
        yield Row((label, AREA), tuple(
            dash if part is None else ours(found := estimate(part), names,
                                           at_chance=found.low <= 0.5)
            for part in areas
        ))  # fmt: skip
    if diff:
        felt = {t for t in tasks if any(_matters(n, runs[0], t, protocol) for n, _ in diff)}
        for title, field in (
            ("accuracy minus preset=correct", ACCURACY),
            ("log-likelihood minus preset=correct", LIKELIHOOD),
        ):
            cells = [
                _versus(runs, base, task, protocol, field) if task in felt else dash
                for task in tasks
            ]
            if any(cell.kind != "dash" for cell in cells):
                yield Row((label, title), tuple(cells))


def _versus(
    runs: Sequence[RecordedRun], base: Sequence[RecordedRun], task: str, protocol: str, field: str
) -> Entry:
    part = difference(runs, base, task, protocol, field)
    if part is None:
        return dash
    names = tuple(dict.fromkeys(run.name for run in (*runs, *base)))
    sides = [(side, cell(side, task, protocol)) for side in (runs, base)]
    is_above = any(above(own, side, task, protocol) for side, own in sides)
    nats = field == LIKELIHOOD
    return versus(compare(part), names, nats=nats, at_chance=not (is_above or nats))


def _baselines(runs: Sequence[RecordedRun], tasks: Sequence[str], protocol: str) -> Iterator[Row]:
    for title, field in (("majority class", "majority_class"), ("chance", "chance")):
        cells = [
            number(100 * runs[0].scores[t, protocol][field], 1, (runs[0].name,)) for t in tasks
        ]
        yield Row((title, ""), tuple(cells))
    levels = (number(100 * reference(runs[0], t, protocol), 1, (runs[0].name,)) for t in tasks)
    yield Row((REFERENCE, ""), tuple(levels))


LEGEND = (
    "In brackets 95 % intervals over items and seeds. First line: scores of the runs without a "
    "switch; below them differences to these, in points of accuracy and in nats of the right "
    "answer's log-likelihood. ° not above chance and the most frequent answer of training. Better "
    "or worse: several seeds, and p at most 0.05 after correction for all comparisons of this "
    "table. "
    "Every block, single values and areas under the ROC curve stand in the details."
)
IN_WORDS = {
    "trainer.loss_on=all": "loss on all tokens",
    "trainer.padding_in_loss=true": "padding in the loss",
    "trainer.order=fixed": "fixed order",
    "method.train_magnitude=false": "magnitudes frozen",
    "method.router_loss=topk": "router loss by all choices",
    "method.router_loss_pooling=all": "router loss over all layers at once",
    "method.router_loss_coef=0.01": "router loss coefficient 1e-2",
    "data.boolq_passage=false": "BoolQ without passages",
    "evaluation.arc_labels=nine": "nine labels for ARC",
    "evaluation.dropout=true": "dropout while scoring",
    "preset=official": "all of the official packages'",
}
"""A switch with its value -> its words."""
LIKELIHOOD_ROW = "log-likelihood of the gold answer"


def _first_page(blocks: Sequence[Block]) -> list[Block]:
    """Return one line for each switch, of blocks with answers as text where there are any."""
    texts = [block for block in blocks if PROTOCOLS["answer_text"] in block.words]
    made = []
    for block in texts or blocks:
        by_label = {row.label: row.cells for row in block.rows}
        none = (dash,) * len(block.columns)

        def line(
            label: str, parts: tuple[str, str], own: dict = by_label, empty: tuple = none
        ) -> Row:
            figures = zip(*(own.get((label, part), empty) for part in parts), strict=True)
            words = ", ".join(IN_WORDS.get(part, part) for part in label.split(", "))
            return Row((words,), tuple(cell for pair in figures for cell in pair))

        rows = [line("preset=correct", ("accuracy", LIKELIHOOD_ROW))]
        rows.append(line(REFERENCE, ("", "-")))
        labels = dict.fromkeys(row.label[0] for row in block.rows)
        minus = ("accuracy minus preset=correct", "log-likelihood minus preset=correct")
        rows += [
            line(label, minus)
            for label in labels
            if any((label, part) in by_label for part in minus)
        ]
        columns = tuple(title for column in block.columns for title in (column, f"{column}, nats"))
        found = Block(block.words, ("switches",), columns, tuple(rows), run=True)
        made.append(seeds_in_heading(found))
    return made


def _plain_first(entry: tuple[Key, Sequence[RecordedRun]]) -> tuple[bool, Key]:
    return json.loads(entry[0][2]).get("preset") != "correct", entry[0]


@table(10, "Switches of the official packages, one at a time")
def switches(sources: Sources) -> Made:
    """Return Table 10: one block per group of runs that differ only in switches."""
    correct, official = sources.composed(), sources.composed("official")
    own = {method: _standard(correct, method) for method in METHOD_TITLES if method in correct}
    presets = {
        "official": {
            method: tuple(
                (n, v) for n, v in _standard(official, method).items() if own[method][n] != v
            )
            for method in own
        }
    }
    groups: dict[tuple[str, str], dict[Diff, dict[int, RecordedRun]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for (_, protocol, _), runs in sorted(sources.blocks.runs.items(), key=_plain_first):
        for run in runs:
            # Custom methods have no line here. Values that the official packages do not use (a
            # sweep over the coefficient) belong to another table, unless a preset sets them: the
            # paper's coefficient differs from that in the packages' code.
            diff = _diff(run, protocol, own[run.method]) if run.method in own else None
            single = str(run.trained["preset"]["name"]).startswith("only_")
            known = single or (diff and set(diff) <= set(presets["official"][run.method]))
            if diff is not None and (known or not diff):
                # A run whose switch has no effect here counts as one without it; only one run per
                # seed is used.
                rest = json.dumps(_rest(run, protocol), sort_keys=True)
                groups[rest, protocol][diff].setdefault(run.seed, run)
    blocks, rests = [], []
    for (rest, protocol), by_seed in sorted(groups.items()):
        variants = {diff: [*runs.values()] for diff, runs in by_seed.items()}
        base = variants.get(())
        if base is None or len(variants) == 1:
            continue
        tasks = [t for t in TASK_TITLES if all(
            (t, protocol) in run.scores for members in variants.values() for run in members
        )]  # fmt: skip
        conditions = json.dumps(base[0].conditions(protocol), sort_keys=True)
        title = block_title((base[0].model, protocol, conditions), sources.standards)[0]
        mix = ", ".join(TASK_TITLES[t] for t in TASK_TITLES if t in base[0].mix)
        model, method = MODEL_TITLES.get(base[0].model, base[0].model), base[0].method
        rows: list[Row] = []
        deciding = _deciding(base[0], protocol)
        named = {n: v for n, v in own[method].items() if n in deciding}
        order = sorted(variants, key=lambda d: (len(d) > 0, len(d) <= 2, str(d)))
        for diff in order:
            label = _label(diff, named, presets, method)
            rows += _rows(label, diff, variants[diff], base, tasks, protocol)
        rows += _baselines(base, tasks, protocol)
        heading = f"{model}, {METHOD_TITLES[method]} trained on {mix}: {title}"
        columns = tuple(TASK_TITLES[task] for task in tasks)
        condition = condition_text((base[0].model, protocol, conditions), sources.standards)
        words = f"{METHOD_TITLES[method]} trained on {mix}: {condition}"
        stub = ("switches", "row")
        blocks.append(Block(heading, stub, columns, tuple(rows), run=True, words=words))
        rests.append(json.loads(rest))
    headings = told_apart([block.heading for block in blocks], rests)
    blocks = [dataclasses.replace(b, heading=h) for b, h in zip(blocks, headings, strict=True)]
    notes = [
        "Not a table of the paper. Runs of one block differ in the named switches alone; the "
        "differences are paired, over the same items and seeds; intervals and marks as in Table 2. "
        "° not above chance and the most frequent answer of training. Log-likelihoods are in nats, "
        "means over items.",
    ]
    return blocks, notes, _first_page, LEGEND
