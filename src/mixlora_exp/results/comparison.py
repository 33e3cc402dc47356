"""Any finished runs side by side: scores, paired differences, and what differs in their settings.

Runs that differ only in their seed are one side. The first side is the one that the others are
compared with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlora_exp.config.resolve import determining, leaves
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RunFiles, find_record
from mixlora_exp.records.wilson import LEVEL
from mixlora_exp.results.data_facts import reference
from mixlora_exp.results.headings import short_hash, word
from mixlora_exp.results.runs import RecordedRun, check_run, circumstances
from mixlora_exp.results.statistics.estimates import Comparison, Estimate, compare, estimate
from mixlora_exp.results.statistics.families import holm
from mixlora_exp.results.tables.paired import ACCURACIES, cell, difference

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Side:
    """Runs that differ only in their seed. `settings`: what determines their result, by dotted
    name, without the seed."""

    letter: str
    runs: tuple[RecordedRun, ...]
    settings: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in ascending order."""
        return sorted(run.seed for run in self.runs)


@dataclass(frozen=True, slots=True)
class Scored:
    """The accuracy of a side. `reference`: what chance, or always giving the most frequent answer,
    reaches."""

    side: Side
    estimate: Estimate
    chance: float
    majority: float
    reference: float

    @property
    def above(self) -> bool:
        """True if the interval lies above the reference."""
        return self.estimate.low > self.reference


@dataclass(frozen=True, slots=True)
class Versus:
    """A side minus the first one. `q`: p, corrected over all comparisons of several seeds that are
    above chance; `at_chance`: neither side is; `why`: the reason if there is no comparison."""

    side: Side
    comparison: Comparison | None
    at_chance: bool = False
    q: float | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        """The comparison in words: better, worse, or why neither can be said."""
        if self.comparison is None:
            return self.why
        if self.at_chance:
            return "at chance"
        if self.q is None:
            return "one seed"
        if self.q > 1 - LEVEL:
            return "not distinguishable"
        return "better" if self.comparison.value > 0 else "worse"


@dataclass(frozen=True, slots=True)
class Measured:
    """One task under one protocol, by one metric, for all sides that have it."""

    task: str
    protocol: str
    metric: str
    scores: tuple[Scored, ...]
    differences: tuple[Versus, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """Sides that are compared. `differing`: field -> its value for each side."""

    sides: tuple[Side, ...]
    differing: Mapping[str, tuple[Any, ...]]
    measured: tuple[Measured, ...]


def read_given(places: Iterable[str]) -> list[RecordedRun]:
    """Return the runs at `places`: folders of finished runs, packed runs, or names of collected
    ones.

    Raises:
        UserError: there is none, a record or its predictions are damaged, or a run is given twice.
    """
    runs: list[RecordedRun] = []
    for place in places:
        run = check_run(RunFiles(find_record(place)), force=True, unplaced=True)
        if any(run.record["content_sha256"] == other.record["content_sha256"] for other in runs):
            raise UserError(f"{place} is given twice: name it once")
        runs.append(run)
    return runs


def _settings(run: RecordedRun) -> dict[str, Any]:
    """Return all that determines a result, of the training and, where it differs, of the
    scoring."""
    found = leaves(determining(dict(run.trained)))
    if run.rescored:
        scored = leaves(determining(dict(run.scored)))
        own = ("method.", "seed", "adapter", "model.", "trainer.", "task.train")
        found |= {name: value for name, value in scored.items() if not name.startswith(own)}
    known = {name: value for name, value in found.items() if name not in ("seed", "adapter")}
    adapter = run.record.get("adapter") or {}
    # What the weights are, not where they lie; those that a run trained, by how it trained them.
    own = None if adapter.get("trained_by") else adapter.get("sha256", "")[:8] or None
    return {**known, "adapter": own}


def _facts(run: RecordedRun) -> dict[str, Any]:
    """Return what a run read and where it ran, by names that no setting has."""
    found = {f"rows of {split}": short_hash([file["sha256"] for file in files])
             for split, files in run.data.items()}  # fmt: skip
    code = run.record.get("code")
    return {**circumstances(run.record), **found, "code": code and str(code)[:8]}


def group(runs: Sequence[RecordedRun]) -> list[Side]:
    """Return the sides, in the order in which they are given.

    Raises:
        UserError: two runs have the same settings and seed, or there are too many sides.
    """
    by_settings: dict[str, list[RecordedRun]] = {}
    settings = {}
    for run in runs:
        own = _settings(run)
        key = json.dumps(own, sort_keys=True)
        settings[key] = own
        for other in by_settings.get(key, ()):
            if other.seed == run.seed:
                raise UserError(
                    f"{other.name} and {run.name} have the same settings and seed: leave one out"
                )
        by_settings.setdefault(key, []).append(run)
    if len(by_settings) > len(LETTERS):
        raise UserError(f"{len(by_settings)} settings are too many: compare at most {len(LETTERS)}")
    return [
        Side(letter, tuple(own), settings[key])
        for letter, (key, own) in zip(LETTERS, by_settings.items(), strict=False)
    ]


def differing(sides: Sequence[Side]) -> dict[str, tuple[Any, ...]]:
    """Return the settings that are not the same for all sides, and what was read and run elsewhere;
    None where a side has no such setting."""
    known = [dict(side.settings) for side in sides]
    for side, own in zip(sides, known, strict=True):
        facts = [_facts(run) for run in side.runs]
        for name in dict.fromkeys(name for fact in facts for name in fact):
            held = dict.fromkeys(word(fact.get(name)) for fact in facts)
            own[name] = ", ".join(held)
    names = dict.fromkeys(name for own in known for name in own)
    values = {name: tuple(own.get(name) for own in known) for name in names}
    return {name: own for name, own in values.items() if len({word(value) for value in own}) > 1}


def _scored(side: Side, task: str, protocol: str, metric: str) -> Scored | None:
    if any((task, protocol) not in run.scores for run in side.runs):
        return None
    part = cell(side.runs, task, protocol, metric)
    if part is None:
        return None
    score = side.runs[0].scores[task, protocol]
    return Scored(
        side,
        estimate(part),
        score["chance"],
        score["majority_class"],
        reference(side.runs[0], task, protocol),
    )


def _seeded(run: RecordedRun, seed: int) -> RecordedRun:
    return dataclasses.replace(run, trained={**run.trained, "seed": seed})


def _versus(side: Side, base: Side, task: str, protocol: str, metric: str) -> Versus:
    first, second = side.runs[0], base.runs[0]
    if first.hashes(task)[0] != second.hashes(task)[0]:
        return Versus(side, None, why="scored on other data")
    items = [run.predictions[task, protocol].keys() for run in (first, second)]
    if items[0] != items[1]:
        return Versus(side, None, why="scored on other items")
    mine, theirs = side.runs, base.runs
    if len(mine) == len(theirs) == 1:
        # One run each: the interval is over items alone, whatever their seeds.
        mine, theirs = ((_seeded(run, 0),) for run in (first, second))
    elif second.method != "none" and not {*side.seeds} & {*base.seeds}:
        return Versus(side, None, why="no seed in common")
    part = difference(mine, theirs, task, protocol, metric)
    return Versus(side, None if part is None else compare(part))


def _corrected(measured: Sequence[Measured]) -> list[Measured]:
    """Return the comparisons of several seeds with their q; the family is all of them."""
    family = [
        versus
        for one in measured
        for versus in one.differences
        if versus.comparison is not None and versus.comparison.seeds > 1 and not versus.at_chance
    ]
    adjusted = holm([one.comparison.p for one in family if one.comparison is not None])
    q = {id(one): value for one, value in zip(family, adjusted, strict=True)}
    return [
        Measured(
            one.task, one.protocol, one.metric, one.scores,
            tuple(dataclasses.replace(v, q=q.get(id(v))) for v in one.differences),
        )
        for one in measured
    ]  # fmt: skip


def compare_runs(runs: Sequence[RecordedRun]) -> Compared:
    """Compare runs on every task and protocol that at least one of them scored.

    Raises:
        UserError: the seeds of one side were scored on different items, or as `group`.
    """
    sides = group(runs)
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    found = []
    for task, protocol in keys:
        for metric in ACCURACIES:
            scores = [_scored(side, task, protocol, metric) for side in sides]
            shown = tuple(one for one in scores if one is not None)
            if not shown:
                continue
            first = shown[0]
            versus = tuple(
                dataclasses.replace(
                    _versus(one.side, first.side, task, protocol, metric),
                    at_chance=not (one.above or first.above),
                )
                for one in shown[1:]
            )
            found.append(Measured(task, protocol, metric, shown, versus))
    return Compared(tuple(sides), differing(sides), tuple(_corrected(found)))
