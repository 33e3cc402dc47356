"""Assigns runs to the cells of tables: same model, method, tasks, protocol and conditions.

Runs under other conditions (fewer rows, a limit, another data source) form separate blocks, headed
by their conditions, so that no cell mixes conditions.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlora_exp.errors import UserError
from mixlora_exp.results.headings import word
from mixlora_exp.results.runs import LeftOut, RecordedRun

USUAL = {
    "data.seed": 0, "train.data.seed": 0, "preset": "correct", "precision": "bfloat16",
    "kernel": "exact",
}  # fmt: skip
MACHINE = ("hardware", "torch", "train.hardware", "train.torch")
"""Conditions that are always part of a block's heading, since they have no default."""


@dataclass(frozen=True, slots=True)
class Standards:
    """The composed defaults with which runs are compared: methods (Table 3), models, and other
    settings; `presets`: the defaults under other presets, by name."""

    methods: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    presets: Mapping[str, Standards] = dataclasses.field(default_factory=dict)

    def of(self, preset: str) -> Standards:
        """Return the defaults under a preset; `self` for an unknown one."""
        return self.presets.get(preset, self)

    def conditions(self, model: str) -> dict[str, Any]:
        """Return the conditions of a full run as in the paper, without the data source."""
        parts = {
            "data": self.data,
            "trainer": self.trainer,
            "evaluation": self.evaluation,
            "model": self.models.get(model, {}),
        }
        found = {f"{p}.{name}": v for p, values in parts.items() for name, v in values.items()}
        return {**found, **USUAL}


def deviations(run: RecordedRun, standards: Standards) -> dict[str, Any]:
    """Return fields of the method in which a run differs from Table 3, with the run's values."""
    standard = standards.of(run.preset).methods[run.method]
    return {k: v for k, v in run.trained["method"].items() if standard.get(k, v) != v}


Key = tuple[str, str, str]
"""(model, protocol, conditions as canonical JSON)"""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Comparable runs by key; each run has only the scores that belong to its block."""

    runs: Mapping[Key, Sequence[RecordedRun]]
    left_out: Sequence[LeftOut]


def _key(conditions: Mapping[str, Any]) -> str:
    return json.dumps(conditions, sort_keys=True)


def group_runs(runs: Iterable[RecordedRun]) -> Blocks:
    """Group runs into blocks of comparable runs. A base model that was only scored is part of every
    block with the same scoring conditions.

    If a cell has two results for one seed, that of the training run counts, or the first by name.
    Results that used different data under the same conditions are all left out.
    """
    blocks: dict[Key, list[RecordedRun]] = defaultdict(list)
    bases: list[tuple[RecordedRun, str]] = []

    def renamed(run: RecordedRun) -> bool:
        # A run's original folder name ends with the beginning of its fingerprint.
        return not run.name.endswith(str(run.record.get("fingerprint"))[:10])

    for run in sorted(runs, key=lambda run: (run.rescored, renamed(run), run.name)):
        for protocol in dict.fromkeys(protocol for _, protocol in run.scores):
            if run.method == "none":
                bases.append((run, protocol))
            else:
                blocks[run.model, protocol, _key(run.conditions(protocol))].append(run)
    for base, protocol in bases:
        own = base.conditions(protocol)
        fitting = [
            key
            for key in blocks
            if key[:2] == (base.model, protocol) and _fits(own, json.loads(key[2]))
        ]
        for key in fitting or [(base.model, protocol, _key(own))]:
            blocks[key].append(base)
    kept: dict[Key, list[RecordedRun]] = {}
    left_out: list[LeftOut] = []
    for key, members in blocks.items():
        dropped = _conflicts(members, key[1])
        left_out += dropped.values()
        pruned = [_without(run, key[1], dropped) for run in members]
        kept[key] = [run for run in pruned if run.scores]
    return Blocks({key: members for key, members in kept.items() if members}, left_out)


def copies(runs: Iterable[RecordedRun]) -> dict[str, LeftOut]:
    """Return runs, by name, with predictions identical to those of a run with another seed, in
    every digit of every score: a record that was copied and edited is not a second seed."""
    found: dict[str, LeftOut] = {}
    seen: dict[str, list[RecordedRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.rescored, run.name)):
        if run.method == "none":
            continue
        alike = seen[json.dumps((run.model, run.method, sorted(run.mix)))]
        own = run.predictions
        for other in alike:
            theirs = other.predictions
            shared = own.keys() & theirs.keys()
            if other.seed != run.seed and shared and all(own[k] == theirs[k] for k in shared):
                reason = (
                    f"seed {run.seed}: its predictions are those of {other.name}, seed {other.seed}"
                )
                found[run.name] = LeftOut(run.name, reason)
                break
        else:
            alike.append(run)
    return found


def _fits(base: Mapping[str, Any], conditions: Mapping[str, Any]) -> bool:
    """Return whether a base model was scored under the conditions of a block."""
    rows = {name for name in conditions if name.startswith("rows.") and name.endswith("/test")}
    return rows <= base.keys() and all(conditions.get(n) == value for n, value in base.items())


def _without(
    run: RecordedRun, protocol: str, dropped: Mapping[tuple[str, str], LeftOut]
) -> RecordedRun:
    scores = {
        (task, own): score
        for (task, own), score in run.scores.items()
        if own == protocol and (run.name, task) not in dropped
    }
    return dataclasses.replace(run, scores=scores)


def _conflicts(members: Sequence[RecordedRun], protocol: str) -> dict[tuple[str, str], LeftOut]:
    """Return (run, task) -> why that score is left out."""
    scored = [(run, task) for run in members for task, own in run.scores if own == protocol]
    found = _other_data(scored, protocol)
    cells: dict[str, list[tuple[RecordedRun, str]]] = defaultdict(list)
    for run, task in scored:
        parts = (run.trained["method"], sorted(run.mix), task)
        cells[json.dumps(parts, sort_keys=True)].append((run, task))
    for entries in cells.values():
        seen: dict[int, RecordedRun] = {}
        for run, task in entries:
            if (run.name, task) in found:
                continue
            # The base model has no seed: scoring it again gives the same result.
            other = seen.setdefault(0 if run.method == "none" else run.seed, run)
            if other is not run:
                reason = f"{task}, {protocol}: {other.name} has the same cell and seed"
                found[run.name, task] = LeftOut(run.name, reason)
    return found


def _other_data(
    scored: Sequence[tuple[RecordedRun, str]], protocol: str
) -> dict[tuple[str, str], LeftOut]:
    """Return scores in a block that used different data than the others, for any method, and are
    therefore not comparable."""
    tested: dict[str, list[tuple[RecordedRun, str]]] = defaultdict(list)
    trained: dict[tuple[str, ...], list[tuple[RecordedRun, str]]] = defaultdict(list)
    for run, task in scored:
        tested[task].append((run, task))
        trained[tuple(sorted(run.mix))].append((run, task))
    found: dict[tuple[str, str], LeftOut] = {}
    groups = [(entries, slice(0, 1)) for entries in tested.values()]
    groups += [(entries, slice(1, None)) for entries in trained.values()]
    for entries, part in groups:
        if len({run.hashes(task)[part] for run, task in entries}) == 1:
            continue
        names = ", ".join(dict.fromkeys(run.name for run, _ in entries))
        for run, task in entries:
            reason = f"{task}, {protocol}: {names} read different data under the same conditions"
            found[run.name, task] = LeftOut(run.name, reason)
    return found


def require_together(runs: Sequence[RecordedRun]) -> None:
    """Refuse runs that must not share a cell. A base model only needs the same scoring conditions.

    Raises:
        UserError: two runs differ in a condition; the message names all three.
    """
    if not runs:
        return
    first = next((run for run in runs if run.method != "none"), runs[0])
    for other in runs:
        pairs = [_described(run) for run in (first, other)]
        for name in sorted(pairs[0].keys() | pairs[1].keys(), key=_importance):
            if other.method == "none" and name not in pairs[1]:
                continue
            mine, theirs = (pair.get(name) for pair in pairs)
            if mine != theirs:
                raise UserError(
                    f"{first.name} and {other.name} cannot share a cell: "
                    f"{name} is {word(mine)} in one and {word(theirs)} in the other; leave one out"
                )


def _described(run: RecordedRun) -> dict[str, Any]:
    protocols = sorted({protocol for _, protocol in run.scores})
    conditions = {n: v for p in protocols for n, v in run.conditions(p).items()}
    return {**conditions, "evaluation.protocols": protocols, "model.name": run.model}


def _importance(name: str) -> tuple[bool, bool, str]:
    # Report data seeds last, because they exist only together with a limit, and protocols first,
    # because some conditions exist only under one protocol.
    return (name.endswith("data.seed"), name != "evaluation.protocols", name)


def _machine_last(entry: tuple[str, Any]) -> tuple[bool, str]:
    return entry[0] in MACHINE, entry[0]


def odd_conditions(key: Key, standards: Standards) -> dict[str, Any]:
    """Return the conditions of a block that are not those of a full run as in the paper, but for
    the source of its data."""
    conditions = json.loads(key[2])
    del conditions["data.name"]
    standard = standards.of(conditions.get("preset", "correct")).conditions(key[0])
    return {k: v for k, v in conditions.items() if standard.get(k) != v}


def block_title(key: Key, standards: Standards) -> tuple[str, bool]:
    """Return a block's conditions as text, and whether they are those of a full run as in the
    paper."""
    model, protocol, text = key
    source, odd = json.loads(text)["data.name"], odd_conditions(key, standards)
    words = [f"model={model}", f"data={source}", f"protocol {protocol}"]
    words += [f"{name}={word(value)}" for name, value in sorted(odd.items(), key=_machine_last)]
    return ", ".join(words), not odd.keys() - set(MACHINE) and source != "embedded"
