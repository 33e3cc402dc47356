"""State and estimated cost of every cell of every table.

Reads experiment files, records and run folders; computes and locks nothing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixlora_exp.config.command import opened, plan_runs
from mixlora_exp.config.later_fields import completed
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.resolve import fingerprint, fingerprint_of, open_session
from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import Config, DataSource
from mixlora_exp.errors import UserError, shown
from mixlora_exp.records.code_hash import code_sha256
from mixlora_exp.records.files import RECORD, record_paths
from mixlora_exp.records.record import read_run
from mixlora_exp.records.required_fields import odd_fields
from mixlora_exp.sweeps.compose_cells import ByGroup
from mixlora_exp.system.runlock import BEAT, holder_of
from mixlora_exp.system.untrusted import read_json

FINISHED = ("done", "recorded")
STATES = (*FINISHED, "running", "stopped", "interrupted", "failed", "refused", "missing")
"""`done`: in the output folder, where `train.py` finds it. `recorded`: only among the committed
records, so `train.py` would run it. `stopped`: locked, but the holder's heartbeat has stopped.
`refused`: the record in the output folder is damaged, or of other data or code."""
LOOK = 2 * BEAT + 1
"""Seconds within which a live holder of a lock updates its heartbeat, unless its disk is slow."""


LOCAL = "recorded with data=local"
"""Detail of a missing cell: a committed record has these settings on data from files."""


@dataclass(frozen=True, slots=True)
class CellState:
    """One run of an experiment. `detail`: its record, its process, its progress, or why it failed;
    `command`: runs it alone."""

    experiment: str
    name: str
    overrides: str
    state: str
    detail: str
    command: str
    config: Config

    # Imported late: torch takes seconds to load, and counts of states need no estimates.
    @property
    def hours(self) -> float:
        """Estimated GPU hours."""
        from mixlora_exp.plans.hours import gpu_hours

        return gpu_hours(self.config)

    @property
    def memory_gib(self) -> float:
        """Estimated memory of a GPU in GiB."""
        from mixlora_exp.plans.memory import peak_bytes

        return peak_bytes(self.config) / 2**30


def _sweeps() -> Iterator[tuple[str, list[list[str]]]]:
    for path in sorted((CONF_DIR / "experiment").rglob("*.yaml")):
        lines = re.findall(r"^# @status (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if lines:
            name = path.relative_to(CONF_DIR / "experiment").with_suffix("").as_posix()
            yield name, [line.split(",") for line in lines]


SWEEPS = dict(_sweeps())
"""The experiments with lines `# @status OVERRIDE,OVERRIDE` in their file's header, and each line's
overrides: the sweeps behind the paper's tables and figures, for the paper's models and a small
one."""


class _Data:
    """Hashes of local data; reads each split once, and nothing from the hub."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[Any, ...], list[str] | None] = {}

    def differing(self, config: Config, record: Mapping[str, Any]) -> list[str] | None:
        """Return splits whose data differ from a record's; None if the data are not available
        locally."""
        if config.data.name is DataSource.hub and config.data.mirror is None:
            return None
        found = {split: self._read(config, split) for split in record["data"]}
        if None in found.values():
            return None
        return [
            split
            for split, files in record["data"].items()
            if [file["sha256"] for file in files] != found[split]
        ]

    def _read(self, config: Config, name: str) -> list[str] | None:
        # Imported late: most tables need no data.
        from mixlora_exp.data.sources import load_split

        data, (task, _, split) = config.data, name.partition("/")
        key = (data.name, data.path, data.mirror, data.seed, name)
        if key not in self._hashes:
            try:
                loaded = load_split(data, task, split, config.task.custom)
                self._hashes[key] = [file.sha256 for file in loaded.files]
            except (UserError, OSError):
                self._hashes[key] = None
        return self._hashes[key]


def _kept(records: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return committed records, by the current fingerprint of their configuration."""
    found = {}
    for path in record_paths(records):
        try:
            record = read_run(path)
            with odd_fields(path):
                found[fingerprint_of(completed(record["config"]))] = path, record
        except UserError:
            continue  # `make tables` reports the error.
    return found


def _shown(path: Path) -> str:
    """Return a path relative to the working directory, if it is inside it."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def _finished(path: Path, config: Config, data: _Data) -> tuple[str, str]:
    """Return the state and detail of a run with a record at `path`: `done` if `train.py` would
    accept it."""
    try:
        record = read_run(path)
        with odd_fields(path):
            changed = data.differing(config, record) or []
    except UserError as error:
        return "refused", str(error)
    if record.get("code", code_sha256()) != code_sha256():
        changed.append("code")
    if changed:
        return "refused", f"{_shown(path)} has other inputs ({', '.join(changed)} differ)"
    return "done", _shown(path)


def _recorded(path: Path, record: Mapping[str, Any], config: Config, data: _Data) -> str | None:
    """Return the detail for a committed record with this run's settings; None if its data
    differ."""
    changed = data.differing(config, record)
    if changed:
        return None
    return _shown(path) + (" (its data was not compared)" if changed is None else "")


def _at_rest(folder: Path, config: Config, recorded: str | None, data: _Data) -> tuple[str, str]:
    """Return the state and detail of a run that no process is executing; `recorded`: detail of its
    committed record, if there is one."""
    if (folder / RECORD).is_file():
        return _finished(folder / RECORD, config, data)
    if recorded is not None:
        return "recorded", recorded
    try:
        failure = read_json(folder / "failure.json")
        return "failed", shown(str(failure["error"]), 500)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    numbers = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    steps = [int(number) for number in numbers if number.isdigit()]
    return ("interrupted", f"after step {max(steps)}") if steps else ("missing", "")


def _unseen(held: Mapping[Path, dict[str, Any]], patience: float) -> set[Path]:
    """Return the locked folders whose holder did not update its heartbeat within `patience`
    seconds, all watched at once: the only way to detect a dead process on another machine."""
    quiet, deadline = set(held), time.monotonic() + patience
    while quiet and time.monotonic() < deadline:
        time.sleep(min(0.25, patience))
        quiet = {folder for folder in quiet if holder_of(folder / "lock") == held[folder]}
    return quiet


def find_cells(
    names: Sequence[str], overrides: Sequence[str], records: Path, patience: float = LOOK
) -> list[CellState]:
    """Return the cells of the sweeps `names` (in `SWEEPS`) with further overrides, for the sweeps'
    models unless an override chooses one. `records`: folder of committed records; `patience`:
    seconds within which holders of locks must update their heartbeat to count as alive.

    Raises:
        UserError: an experiment is unknown, or an override is not valid.
    """
    planned, overrides = [], opened(overrides)
    chosen = any(line.startswith("model=") for line in overrides)
    by_group = ByGroup()
    with open_session() as session:
        for name in names:
            if name not in SWEEPS:
                raise UserError(f"experiment={name} is unknown: choose from {', '.join(SWEEPS)}")
            for words in ((),) if chosen else SWEEPS[name]:
                given = (*(w for w in words if not _given(w, overrides)), *overrides)
                all_words = [f"experiment={name}", *given]
                plan = plan_runs(session, "config", all_words, True, by_group.cell, by_group.sweep)
                title = " ".join([name, *words])
                for cell in plan.cells:
                    own = [
                        line
                        for line in cell.overrides
                        if line not in given and not line.startswith("experiment=")
                    ]
                    planned.append((title, own, given, _resolved(cell.config)))
    folders = [Path(c.output_dir).expanduser() / run_name(c) for *_, c in planned]
    found = {folder: holder_of(folder / "lock") for folder in folders}
    held = {folder: holder for folder, holder in found.items() if holder is not None}
    unseen = _unseen(held, patience)
    kept, data, cells = _kept(records), _Data(), []
    for (name, own, given, config), folder in zip(planned, folders, strict=True):
        if folder in held and not (folder in unseen and (folder / RECORD).is_file()):
            holder = held[folder]
            who = shown(f"{holder.get('host')}, process {holder.get('pid')}", 200)
            state, detail = "running", who
            if folder in unseen:
                state, detail = "stopped", f"not seen alive for {patience:g} s: {who}"
        else:
            committed = kept.get(fingerprint(config))
            recorded = None if committed is None else _recorded(*committed, config, data)
            state, detail = _at_rest(folder, config, recorded, data)
            if state == "missing" and _on_local_data(config) in kept:
                detail = LOCAL
        command = " ".join(
            ["python train.py -m", f"experiment={name.partition(' ')[0]}", *own, *given]
        )
        overridden = " ".join(own)
        cells.append(CellState(name, folder.name, overridden, state, detail, command, config))
    return cells


def _on_local_data(config: Config) -> str | None:
    """Return the fingerprint that the run of `data=hub` has on files, whose place does not
    count."""
    if config.data.name is not DataSource.hub:
        return None
    data = replace(config.data, name=DataSource.local, path="data", mirror=None)
    return fingerprint(replace(config, data=data))


def _given(word: str, overrides: Sequence[str]) -> bool:
    return any(line.startswith(f"{word.partition('=')[0]}=") for line in overrides)


def _resolved(config: Config) -> Config:
    """Return the configuration as `train.py` fingerprints it, with the architecture of `model.path`
    and the rank that `method.match_params` asks for."""
    known = config.model.path is None and config.model.config
    if known and getattr(config.method, "match_params", None) is None:
        return config
    # Imported late: it needs torch.
    from mixlora_exp.runs.inputs import resolve_config

    return resolve_config(config)
