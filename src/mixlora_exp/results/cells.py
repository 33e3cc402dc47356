"""Which runs stand in which cell of a table: same model, method, tasks, protocol and conditions.

Runs under other conditions (fewer rows, a limit, another data source) are a block of their own,
with their conditions over it, so that no cell ever mixes the two.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlora_exp.errors import UserError
from mixlora_exp.results.runs import LeftOut, Run

__all__ = ["Blocks", "Standards", "block_title", "deviations", "group_runs", "require_together"]


@dataclass(frozen=True, slots=True)
class Standards:
    """The composed defaults that runs are compared with: each method (Table 3), and everything
    else of a run."""

    methods: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any]

    def conditions(self) -> dict[str, Any]:
        """Those of a full run of the paper's, the data's source apart."""
        trainer = {f"trainer.{name}": value for name, value in self.trainer.items()}
        data = {f"data.{name}": value for name, value in self.data.items()}
        return {**data, **trainer, "evaluation.limit": None}


def deviations(run: Run, standards: Standards) -> dict[str, Any]:
    """Fields of the method in which a run differs from Table 3's."""
    standard = standards.methods[run.method]
    return {k: v for k, v in run.trained["method"].items() if standard.get(k, v) != v}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Runs by (model, protocol, conditions), the conditions as canonical JSON."""

    runs: Mapping[tuple[str, str, str], Sequence[Run]]
    left_out: Sequence[LeftOut]


def _key(conditions: Mapping[str, Any]) -> str:
    return json.dumps(conditions, sort_keys=True)


def group_runs(runs: Iterable[Run]) -> Blocks:
    """Blocks of runs that may stand together. A base model that was only scored stands in every
    block of the same scoring. Two runs of one cell and seed are one too many: the later name is
    left out, and both are if they read different data under the same conditions."""
    blocks: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    bases: list[tuple[Run, str]] = []
    left_out: list[LeftOut] = []
    for run in runs:
        for protocol in dict.fromkeys(protocol for _, protocol in run.scores):
            if run.method == "none":
                bases.append((run, protocol))
            else:
                blocks[run.model, protocol, _key(run.conditions())].append(run)
    for base, protocol in bases:
        own = base.conditions()
        fitting = [
            key
            for key in blocks
            if key[:2] == (base.model, protocol)
            and all(json.loads(key[2]).get(name) == value for name, value in own.items())
        ]
        for key in fitting or [(base.model, protocol, _key(own))]:
            blocks[key].append(base)
    for (_, protocol, _), members in blocks.items():
        left_out += _conflicts(members, protocol)
    dropped = {entry.name for entry in left_out}
    kept = {
        key: [run for run in members if run.name not in dropped] for key, members in blocks.items()
    }
    return Blocks({key: members for key, members in kept.items() if members}, left_out)


def _conflicts(members: Sequence[Run], protocol: str) -> list[LeftOut]:
    found = []
    by_task: dict[str, dict[tuple[str, ...], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in members:
        for task, own in run.scores:
            if own == protocol:
                by_task[task][run.test_hashes(task)].append(run)
    for task, hashes in by_task.items():
        if len(hashes) > 1:
            names = [run.name for group in hashes.values() for run in group]
            reason = f"other test data of {task} than {', '.join(names)} under the same conditions"
            found += [LeftOut(name, reason) for name in names]
    seen: dict[str, Run] = {}
    for run in members:
        for task, own in run.scores:
            if own != protocol:
                continue
            parts = (run.trained["method"], run.mix, run.seed, task)
            key = json.dumps(parts, sort_keys=True)
            other = seen.setdefault(key, run)
            if other is not run:
                reason = f"{other.name} has the same cell and seed ({task}, {protocol})"
                found.append(LeftOut(run.name, reason))
                break
    return found


def require_together(runs: Sequence[Run]) -> None:
    """Refuse runs that must not share a cell.

    Raises:
        UserError: it names the two and the condition in which they differ.
    """
    first, *others = runs
    for other in others:
        mine, theirs = first.conditions(), other.conditions()
        mine["evaluation.protocols"] = sorted({p for _, p in first.scores})
        theirs["evaluation.protocols"] = sorted({p for _, p in other.scores})
        # A seed for the choice of rows is there only with a limit, which is the difference then.
        names = sorted(mine.keys() | theirs.keys(), key=lambda name: (name == "data.seed", name))
        for name in names:
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"{first.name} and {other.name} cannot share a cell: "
                    f"{name} is {mine.get(name)} in one and {theirs.get(name)} in the other"
                )


def block_title(key: tuple[str, str, str], standards: Standards) -> tuple[str, bool]:
    """The conditions of a block in words, and whether they are those of a full run."""
    model, protocol, text = key
    conditions = json.loads(text)
    source = conditions.pop("data.name")
    standard = standards.conditions()
    odd = {k: v for k, v in conditions.items() if k != "data.seed" and standard.get(k) != v}
    words = [f"model={model}", f"data={source}", f"protocol {protocol}"]
    words += [f"{name}={_word(value)}" for name, value in sorted(odd.items())]
    return ", ".join(words), not odd and source != "embedded"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value is None else str(value)
