"""What each switch between this project and the official packages does: not a table of the paper.

Runs that differ in switches alone are compared with the one that has none of them set, on the same
items and seeds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.results.cells import Blocks, Standards, block_title
from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES, TASK_TITLES
from mixlora_exp.results.runs import Run
from mixlora_exp.results.statistics import estimate
from mixlora_exp.results.tables.paired import LIKELIHOOD, RIGHT, difference
from mixlora_exp.results.tables.parts import Block, Row, Table, number, ours

__all__ = ["switch_table"]

Diff = tuple[tuple[str, Any], ...]
"""Switches that are not as in `preset=correct`, with their values."""


def _values(run: Run) -> dict[str, Any]:
    """The switches of a run, those that its method does not have left out."""
    found = {}
    for dotted in SWITCHES.values():
        group, name = dotted.split(".")
        side = run.scored if group in ("evaluation", "data") else run.trained
        if name in side[group]:
            found[dotted] = side[group][name]
    return found


def _rest(run: Run, protocol: str) -> str:
    """Everything else that must be equal, as a key."""
    conditions = {
        name: value
        for name, value in run.conditions(protocol).items()
        if name not in SWITCHES.values() and name != "preset"
    }
    method = {
        n: v for n, v in run.trained["method"].items() if f"method.{n}" not in SWITCHES.values()
    }
    # Blocks keep apart what read other data under equal conditions, but not across switches.
    data = [run.hashes(task) for task in sorted({task for task, _ in run.scores})]
    return json.dumps((run.model, method, sorted(run.mix), conditions, data), sort_keys=True)


def _diff(run: Run, standard: Mapping[str, Any]) -> Diff:
    return tuple((n, v) for n, v in _values(run).items() if standard[n] != v)


def _standard(configs: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The switches of `preset=correct` for a method."""
    found = {}
    for dotted in SWITCHES.values():
        group, name = dotted.split(".")
        if name in configs[method][group]:
            found[dotted] = configs[method][group][name]
    return found


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(values: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in values)


def _label(
    diff: Diff, own: Mapping[str, Any], presets: Mapping[str, Mapping[str, Diff]], method: str
) -> str:
    """The preset's name with what is otherwise, or the switches alone, whichever is shorter."""
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
    label: str, runs: Sequence[Run], base: Sequence[Run], tasks: Sequence[str], protocol: str
) -> Iterator[Row]:
    names = tuple(dict.fromkeys(run.name for run in runs))
    scores = {t: [run.scores[t, protocol] for run in runs] for t in tasks}
    cells = [ours(estimate([s["accuracy"] for s in scores[t]], scores[t][0]["n"]), names)
             for t in tasks]  # fmt: skip
    yield Row((label, "accuracy"), tuple(cells))
    likelihoods = [[s["gold_log_likelihood"] for s in scores[t]] for t in tasks]
    if not any(value is None for row in likelihoods for value in row):
        cells = [number(mean(row), 3, names) for row in likelihoods]
        yield Row((label, "log-likelihood of the gold answer"), tuple(cells))
    if runs is not base:
        for title, field in (
            ("accuracy minus preset=correct", RIGHT),
            ("log-likelihood minus preset=correct", LIKELIHOOD),
        ):
            cells = [difference(runs, base, task, protocol, field) for task in tasks]
            if any(cell.value is not None for cell in cells):
                yield Row((label, title), tuple(cells))


def _baselines(runs: Sequence[Run], tasks: Sequence[str], protocol: str) -> Iterator[Row]:
    for title, field in (("majority class", "majority_class"), ("chance", "chance")):
        cells = [
            number(100 * runs[0].scores[t, protocol][field], 1, (runs[0].name,)) for t in tasks
        ]
        yield Row((title, ""), tuple(cells))


def switch_table(
    found: Blocks,
    standards: Standards,
    correct: Mapping[str, Any],
    official: Mapping[str, Any],
) -> Table:
    """One block per group of runs in which switches alone differ. `correct`, `official`: the
    composed run of each method under the preset, as dictionaries."""
    own = {method: _standard(correct, method) for method in METHOD_TITLES if method in correct}
    presets = {
        "official": {
            method: tuple(
                (n, v) for n, v in _standard(official, method).items() if own[method][n] != v
            )
            for method in own
        }
    }
    groups: dict[tuple[str, str], dict[Diff, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for (_, protocol, _), runs in found.runs.items():
        for run in runs:
            # A method of the user's own has no line here, and a value that the official packages
            # do not have (a sweep over the coefficient) belongs to another table, unless a preset
            # names it: for the coefficient the paper and the packages' code differ.
            diff = _diff(run, own[run.method]) if run.method in own else None
            single = str(run.trained["preset"]["name"]).startswith("only_")
            known = single or (diff and set(diff) <= set(presets["official"][run.method]))
            if diff is not None and (known or not diff):
                groups[_rest(run, protocol), protocol][diff].append(run)
    blocks = []
    for (_, protocol), variants in sorted(groups.items()):
        base = variants.get(())
        if base is None or len(variants) == 1:
            continue
        tasks = [t for t in TASK_TITLES if all(
            (t, protocol) in run.scores for members in variants.values() for run in members
        )]  # fmt: skip
        conditions = json.dumps(base[0].conditions(protocol), sort_keys=True)
        title = block_title((base[0].model, protocol, conditions), standards)[0]
        mix = ", ".join(TASK_TITLES[t] for t in TASK_TITLES if t in base[0].mix)
        model, method = MODEL_TITLES.get(base[0].model, base[0].model), base[0].method
        rows: list[Row] = []
        order = sorted(variants, key=lambda d: (len(d) > 0, len(d) <= 2, str(d)))
        for diff in order:
            label = _label(diff, own[method], presets, method)
            rows += _rows(label, variants[diff], base, tasks, protocol)
        rows += _baselines(base, tasks, protocol)
        heading = f"{model}, {METHOD_TITLES[method]} trained on {mix}: {title}"
        columns = tuple(TASK_TITLES[task] for task in tasks)
        blocks.append(Block(heading, ("switches", "row"), columns, tuple(rows), run=True))
    notes = [
        "Not a table of the paper. Runs of one block differ in the named switches alone; the "
        "differences are paired, over the same items and seeds: bootstrap over items, widened to "
        "Student's interval over seeds. Better or worse stands only where the interval leaves out "
        "zero. Log-likelihoods are in nats, means over items.",
    ]
    return Table(10, "Switches of the official packages, one at a time", blocks, notes)
